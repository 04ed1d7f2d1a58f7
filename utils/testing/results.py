"""What one model got on one bench: metrics, their resamples, and the rows that tables show of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from utils.testing.bench import Bench
from utils.testing.bootstrap import interval
from utils.testing.contenders import Contender
from utils.testing.metrics import METRICS, Sample

# Stands for all classes where there is a class otherwise; none is called so.
AVERAGE = ""


def written_name(class_name: str) -> str:
    """What a class, or the average, is called in files. A class that is called average has a full stop behind."""
    if class_name == AVERAGE:
        return "average"
    return f"{class_name}." if class_name.rstrip(".").casefold() == "average" else class_name


@dataclass(frozen=True)
class Row:
    """A row of a table: {metric: value in [0, 1], NaN where undefined}.

    `of`: the model, or what is meant by several; `less`: "base" or "control" in a row of differences. `low` and `high`
    bound the 95 % interval over the images of the test, `spread` is the sample standard deviation over seeds; a row has
    the one or the other.
    """

    of: str
    less: str | None
    values: dict[str, float]
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What stands before the values: a difference stands beneath the row of its model."""
        return f"less its {self.less}" if self.less else self.of

    def is_sure(self, metric: str) -> bool:
        """Whether a difference has an interval that leaves out 0."""
        if not self.less or not self.low:
            return False
        return self.low[metric] > 0 or self.high[metric] < 0


@dataclass(frozen=True)
class Results:
    """A contender's results on a bench, and those of what it is compared with, by their roles ("base", "control").

    By class: `samples`. By class and for AVERAGE: `values` {metric: value} and `resampled` {metric: [R]}.
    """

    bench: Bench
    contender: Contender
    samples: Mapping[str, Sample]
    values: Mapping[str, Mapping[str, float]]
    resampled: Mapping[str, Mapping[str, np.ndarray]]
    references: Mapping[str, "Results"]

    @property
    def name(self) -> str:
        """The contender's."""
        return self.contender.name

    @property
    def classes(self) -> list[str]:
        """The classes of the bench, without AVERAGE."""
        return list(self.samples)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The model's own row, by class and for AVERAGE."""
        found = {}
        for class_name, values in self.values.items():
            low, high = _bounds(values, self.resampled[class_name])
            # A metric has limits, which its standard interval does not know.
            low, high = ({metric: float(np.clip(end, 0, 1)) for metric, end in ends.items()} for ends in (low, high))
            found[class_name] = Row(self.name, None, dict(values), low, high)
        return found

    @cached_property
    def differences(self) -> dict[str, dict[str, Row]]:
        """{"base" or "control": what the model has less than it, image by image, by class and for AVERAGE}."""
        return {
            role: {class_name: self._less(other, role, class_name) for class_name in self.values}
            for role, other in self.references.items()
        }

    def _less(self, other: "Results", role: str, class_name: str) -> Row:
        mine, theirs = self.values[class_name], other.values[class_name]
        values = {metric: mine[metric] - theirs[metric] for metric in METRICS}
        draws, others = self.resampled[class_name], other.resampled[class_name]
        return Row(
            self.name, role, values, *_bounds(values, {metric: draws[metric] - others[metric] for metric in METRICS})
        )

    def improvement(self, class_name: str) -> np.ndarray:
        """How much better than its base the model is on each image of a class [n].

        Of an anomalous image with a mask the difference of pixel AP; of another that of the published score, towards
        its label. Raises KeyError where there is no base to compare with.
        """
        mine, theirs = self.samples[class_name], self.references["base"].samples[class_name]
        moved = (mine.published_scores - theirs.published_scores) * np.where(mine.labels, 1, -1)
        sharper = mine.pixel_ap - theirs.pixel_ap
        return np.where(np.isnan(sharper), moved, sharper)

    def choose(self, class_name: str, count: int) -> list[int]:
        """Numbers of up to `count` anomalous and `count` normal images of a class that are worth a look.

        Of each kind those that improved most come first, then those that worsened most; without a base the first ones.
        """
        labels = self.samples[class_name].labels
        if "base" not in self.references:
            return [row for label in (1, 0) for row in np.flatnonzero(labels == label)[:count].tolist()]
        moved = self.improvement(class_name)
        chosen: list[int] = []
        for label in (1, 0):
            kind = np.flatnonzero(labels == label)
            order = kind[np.argsort(-moved[kind], kind="stable")].tolist()
            better, worse = order[: (count + 1) // 2], order[::-1][: count // 2]
            chosen += dict.fromkeys([*better, *worse])
        return chosen


def _bounds(
    values: Mapping[str, float], resampled: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, float]]:
    """Lower and upper ends of the intervals of all metrics."""
    both = {metric: interval(values[metric], resampled[metric]) for metric in METRICS}
    return {metric: pair[0] for metric, pair in both.items()}, {metric: pair[1] for metric, pair in both.items()}
