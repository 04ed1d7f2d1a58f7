"""Does it change the base? All results on one bench, and the rows that say it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dataset.sets import DataSet
from model.config import ModelConfig
from utils.options import completed
from utils.settings import Settings
from utils.testing.bench import Bench
from utils.testing.metrics import METRICS
from utils.testing.results import AVERAGE, Results, Row


@dataclass(frozen=True)
class Comparison:
    """Results of several models on one bench, in the order in which they are shown; `resamples`: of the intervals."""

    results: Sequence[Results]
    resamples: int

    @property
    def bench(self) -> Bench:
        """The bench of all results."""
        return self.subject.bench

    @property
    def data(self) -> DataSet:
        """The data set of the bench."""
        return self.bench.data

    @property
    def subject(self) -> Results:
        """The model that it is all about: the last one."""
        return self.results[-1]

    @property
    def classes(self) -> list[str]:
        """The classes of the data set, without AVERAGE."""
        return self.subject.classes

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Of each class and of AVERAGE: every model, what it is less its base and its control, means over seeds.

        And, beside the average, what AA-CLIP's authors report of the whole data set.
        """
        found: dict[str, list[Row]] = {name: [] for name in self.subject.values}
        for name, rows in found.items():
            for result in self.results:
                rows += [result.rows[name], *(less[name] for less in result.differences.values())]
        for group in same_but_for_seed(self.results):
            found[AVERAGE] += pooled(group)
        if self.data.reported:
            values = {metric: self.data.reported.get(metric, np.nan) / 100 for metric in METRICS}
            found[AVERAGE].append(Row("reported by AA-CLIP, trained on VisA", None, values))
        return found

    @property
    def trained_here(self) -> list[str]:
        """Names of the models that were trained on this very data set, so that this is no zero-shot test."""
        return [result.name for result in self.results if result.contender.was_trained_on(self.data) is True]

    @cached_property
    def left_out(self) -> dict[str, list[str]]:
        """{metric: classes where it is undefined} for those metrics that an average has from some classes only."""
        found = {}
        for metric in METRICS:
            averaged = [result for result in self.results if not np.isnan(result.values[AVERAGE][metric])]
            classes = {name for result in averaged for name in result.classes if np.isnan(result.values[name][metric])}
            if classes:
                found[metric] = sorted(classes)
        return found


def same_but_for_seed(results: Sequence[Results]) -> list[dict[int, Results]]:
    """Of two models or more whose records differ in nothing but the seed, own and of the base, {seed: results}."""
    groups: dict[str, dict[int, Results]] = {}
    for result in results:
        checkpoint = result.contender.checkpoint
        if checkpoint.seed is None:
            continue
        own, of_base = (
            {name: value for name, value in completed(Settings, settings).items() if name != "seed"} if settings else {}
            for settings in (None if checkpoint.is_base else checkpoint.training, checkpoint.base.get("training"))
        )
        # The settings of AA-CLIP's own bases are not known: then it must be the same one.
        which = of_base or checkpoint.base["sha256"]
        model = completed(ModelConfig, checkpoint.model or {})
        same = [sorted(record.items()) for record in (model, own, which)]
        key = repr((checkpoint.loop, *same, "continued_from" in checkpoint.base))
        groups.setdefault(key, {})[checkpoint.seed] = result
    return [group for group in groups.values() if len(group) > 1]


def pooled(by_seed: dict[int, Results]) -> list[Row]:
    """Mean and standard deviation over seeds: of the average, and of its differences where all models have them."""
    group = list(by_seed.values())
    name = f"mean of {group[0].name} over seeds {', '.join(map(str, sorted(by_seed)))}"
    rows = [_mean(name, None, [result.rows[AVERAGE] for result in group])]
    for role in ("base", "control"):
        if all(role in result.references for result in group):
            rows.append(_mean(name, role, [result.differences[role][AVERAGE] for result in group]))
    return rows


def _mean(of: str, less: str | None, rows: list[Row]) -> Row:
    def over_seeds(summary: Callable[[list[float]], float]) -> dict[str, float]:
        return {metric: summary([row.values[metric] for row in rows]) for metric in METRICS}

    return Row(of, less, over_seeds(statistics.mean), spread=over_seeds(statistics.stdev))
