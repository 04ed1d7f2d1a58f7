"""Does it change the base? The rows of every table: results, differences with intervals, and means over seeds."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from dataset.constants import DATA_SETS
from dataset.sets import DataSet
from utils.bootstrap import interval
from utils.evaluation import AVERAGE, Tested
from utils.metrics import METRICS


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


def comparison(tested: list[Tested], data: DataSet, class_name: str) -> list[Row]:
    """All rows of a class or of AVERAGE: each model, what it is less its base and its control, means over seeds."""
    rows = []
    for each in tested:
        rows += [result(each, class_name), *(difference(each, title, class_name) for title in each.references)]
    if class_name == AVERAGE:
        for group in same_but_for_seed(tested):
            rows += pooled(group)
        info = DATA_SETS.get(data.name)
        if info and info.reported:
            values = {name: info.reported.get(name, np.nan) / 100 for name in METRICS}
            rows.append(Row("reported by AA-CLIP, trained on VisA", None, values))
    return rows


def result(each: Tested, class_name: str) -> Row:
    """A model's own row."""
    values, resampled = each.results[class_name], each.resampled[class_name]
    row = _with_interval(each.name, None, values, resampled)
    # A metric has limits, which its standard interval does not know.
    low, high = ({name: float(np.clip(end, 0, 1)) for name, end in ends.items()} for ends in (row.low, row.high))
    return replace(row, low=low, high=high)


def difference(each: Tested, title: str, class_name: str) -> Row:
    """A model's row less that of its base or control, image by image."""
    other = each.references[title]
    values, resampled = (
        {name: mine[class_name][name] - theirs[class_name][name] for name in METRICS}
        for mine, theirs in ((each.results, other.results), (each.resampled, other.resampled))
    )
    return _with_interval(each.name, title, values, resampled)


def _with_interval(of: str, less: str | None, values: dict[str, float], resampled: dict[str, np.ndarray]) -> Row:
    bounds = {metric: interval(values[metric], resampled[metric]) for metric in METRICS}
    low, high = ({metric: pair[side] for metric, pair in bounds.items()} for side in (0, 1))
    return Row(of, less, values, low, high)


def same_but_for_seed(tested: list[Tested]) -> list[list[Tested]]:
    """Groups of two models or more whose records differ in nothing but the seed, their own and their base's."""
    groups: dict[str, dict[int, Tested]] = {}
    for each in tested:
        checkpoint, base = each.checkpoint, each.checkpoint.base
        if each.seed is None:
            continue
        own, of_base = (
            {name: value for name, value in (settings or {}).items() if name != "seed"}
            for settings in (checkpoint.training if checkpoint.loop else None, base.get("training"))
        )
        # The settings of AA-CLIP's own bases are not known: then it must be the same one.
        which = of_base or base["sha256"]
        key = repr((checkpoint.loop, checkpoint.model, own, which, "continued_from" in base))
        groups.setdefault(key, {})[each.seed] = each
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def pooled(group: list[Tested]) -> list[Row]:
    """Mean and standard deviation over seeds: of the average, and of its differences where all models have them."""
    seeds = ", ".join(str(seed) for seed in sorted(each.seed for each in group))
    name = f"mean of {group[0].name} over seeds {seeds}"
    rows = [_mean(name, None, [result(each, AVERAGE) for each in group])]
    for title in ("base", "control"):
        if all(title in each.references for each in group):
            rows.append(_mean(name, title, [difference(each, title, AVERAGE) for each in group]))
    return rows


def _mean(of: str, less: str | None, rows: list[Row]) -> Row:
    def over_seeds(summary: Callable[[list[float]], float]) -> dict[str, float]:
        return {metric: summary([row.values[metric] for row in rows]) for metric in METRICS}

    return Row(of, less, over_seeds(statistics.mean), spread=over_seeds(statistics.stdev))


def left_out(tested: list[Tested]) -> dict[str, list[str]]:
    """{metric: classes where it is undefined} for those metrics that an average has from some classes only."""
    found = {}
    for name in METRICS:
        averaged = [each for each in tested if not np.isnan(each.results[AVERAGE][name])]
        classes = {own for each in averaged for own in each.classes if np.isnan(each.results[own][name])}
        if classes:
            found[name] = sorted(classes)
    return found


def improvement(each: Tested, class_name: str) -> np.ndarray:
    """How much better than its base a model is on each image of a class [n].

    Of an anomalous image with a mask the difference of pixel AP; of another that of the image score, towards its label.
    """
    mine, theirs = each.samples[class_name], each.references["base"].samples[class_name]
    moved = (mine.scores - theirs.scores) * np.where(mine.labels, 1, -1)
    sharper = mine.pixel_ap - theirs.pixel_ap
    return np.where(np.isnan(sharper), moved, sharper)


def as_json(rows: list[Row]) -> list[dict]:
    """Rows as plain types, without empty parts; undefined values are None."""
    return [
        {
            part: {k: None if np.isnan(v) else v for k, v in content.items()} if isinstance(content, dict) else content
            for part, content in asdict(row).items()
            if content
        }
        for row in rows
    ]
