"""One pass over the images of a bench: every model's results on them."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dataset.loading import Batch
from forward_utils_cross_attention import Prediction
from utils import processes
from utils.logs import progress
from utils.testing.bench import Bench
from utils.testing.bootstrap import RESAMPLES, enough, resample
from utils.testing.comparison import Comparison
from utils.testing.contenders import Contender
from utils.testing.metrics import METRICS, ClassScores, PixelCounts, Sample, find_defects, mean_over_classes
from utils.testing.results import AVERAGE, Results

logger = logging.getLogger(__name__)


@dataclass
class Taken:
    """What is taken in of a contender, class by class, to be its `Results`."""

    contender: Contender
    samples: dict[str, Sample] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    resampled: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def average(self, resamples: int) -> None:
        """Add the average of the classes, without intervals where a class has too few images."""
        self.values[AVERAGE] = mean_over_classes(list(self.values.values()))
        self.resampled[AVERAGE] = mean_over_classes(list(self.resampled.values()))
        if not all(enough(sample.labels) for sample in self.samples.values()):
            self.resampled[AVERAGE] = dict.fromkeys(METRICS, np.full(resamples, np.nan))


def measure(
    bench: Bench,
    contenders: Sequence[Contender],
    resamples: int = RESAMPLES,
    seed: int = 0,
    earlier: Mapping[Contender, Results | None] | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Comparison | None:
    """Test models on a bench and compare them. `contenders` come after what they are compared with.

    `earlier` are results on the same bench with the same `resamples` and `seed`: these models are not tested again.
    `after_batch` may end the work by an exception. None in other processes than the first, which all take part.
    """
    earlier = earlier or {}
    tested = [Taken(contender) for contender in contenders if contender not in earlier]
    for class_name, scores in scores_by_class(bench, [taken.contender for taken in tested], after_batch):
        samples = [of_model.sample() for of_model in scores]
        # Drawn by class and seed alone, so that models which are tested apart have the same draws.
        draws = resample(samples, (seed, list(bench.data.descriptions).index(class_name)), resamples)
        for taken, of_model, sample, resampled in zip(tested, scores, samples, draws, strict=True):
            taken.samples[class_name] = sample
            taken.values[class_name] = of_model.metrics(sample)
            taken.resampled[class_name] = resampled
    if not processes.is_first():
        return None
    known = {contender: results for contender, results in earlier.items() if results}
    for taken in tested:
        taken.average(resamples)
        references = {role: known[other] for role, other in taken.contender.references.items()}
        known[taken.contender] = Results(
            bench, taken.contender, taken.samples, taken.values, taken.resampled, references
        )
    comparison = Comparison([known[contender] for contender in contenders], resamples)
    if comparison.trained_here:
        logger.warning(
            "NOT ZERO-SHOT: trained on %s, the data set of this test: %s. "
            "These numbers say how well it fits, not how well it transfers.",
            bench.data.source,
            ", ".join(comparison.trained_here),
        )
    return comparison


def scores_by_class(
    bench: Bench, contenders: Sequence[Contender], after_batch: Callable[[], None]
) -> Iterator[tuple[str, list[ClassScores]]]:
    """Each class as soon as its last image went through, and what every model said of its images.

    Where there are several processes, they take the batches in turns, and the first one alone is given the classes.
    """
    records, batch_size = bench.records, bench.batching.batch_size
    firsts: dict[str, int] = {}
    lasts: dict[str, int] = {}
    for number, record in enumerate(records):
        firsts.setdefault(record.class_name, number)
        lasts[record.class_name] = number
    in_hand: dict[str, list[ClassScores]] = {}  # at most the classes of one round
    predictions = bench.predictions(contenders, records, after_batch, take=processes.own_turns)
    emptied = 0
    with progress(total=len(records), desc=bench.data.name, unit="image") as bar:
        for start in range(0, len(records), batch_size * processes.count()):
            stop = min(start + batch_size * processes.count(), len(records))
            own = start + batch_size * processes.number()
            batch, found = next(predictions, (None, []))  # the last round may have fewer batches than processes
            begun = [name for name, first in firsts.items() if start <= first < stop]
            here = {name: firsts[name] - own for name in begun if own <= firsts[name] < own + batch_size}
            in_hand |= _begin(bench, contenders, begun, {n: [p.maps[row] for p in found] for n, row in here.items()})
            if batch is not None:
                emptied += int(batch["emptied"].sum())
                _take_in(in_hand, batch, found, own)
            for name in [name for name, last in lasts.items() if start <= last < stop]:
                scores = _brought_together(in_hand.pop(name))
                if processes.is_first():
                    yield name, scores
            bar.update(stop - start)
        next(predictions, None)  # what comes after the last batch
    emptied = int(processes.total(torch.tensor(emptied)))
    if emptied:
        logger.warning(
            "%s: %d masks are empty at the model's image size: no defect is found there.", bench.data.name, emptied
        )


def _begin(
    bench: Bench, contenders: Sequence[Contender], names: list[str], first_maps: dict[str, list[Tensor]]
) -> dict[str, list[ClassScores]]:
    """Empty scores of classes, of each model; `first_maps`, one of each model, of those that begin in this process."""
    if not names:
        return {}
    own = {name: [one.median().item() for one in maps] for name, maps in first_maps.items()}
    middles = {name: found for part in processes.for_all(own) for name, found in part.items()}
    return {
        name: [
            ClassScores(bench.data.domain, contender.checkpoint.calibration, pixels=PixelCounts(middle))
            for contender, middle in zip(contenders, middles[name], strict=True)
        ]
        for name in names
    }


def _take_in(in_hand: dict[str, list[ClassScores]], batch: Batch, found: list[Prediction], start: int) -> None:
    """Add every model's predictions on a batch, whose first image has the number `start`, to the scores of classes."""
    names = batch["class_name"]
    defects = [find_defects(mask.numpy()) for mask in batch["mask"].squeeze(1)]
    for class_name in dict.fromkeys(names):
        rows = [row for row, name in enumerate(names) if name == class_name]
        for scores, prediction in zip(in_hand[class_name], found, strict=True):
            scores.add(prediction, batch, rows, defects, start)


def _brought_together(scores: list[ClassScores]) -> list[ClassScores]:
    """Every model's scores of a class from all processes, in the first of them."""
    if processes.count() > 1:
        for others in processes.for_first([of_model.state() for of_model in scores])[1:]:
            for of_model, state in zip(scores, others, strict=True):
                of_model.merge(state)
    return scores
