"""One pass over the images of a bench: every model's results on them."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.logs import progress
from utils.testing.bench import Bench
from utils.testing.bootstrap import RESAMPLES, enough, resample
from utils.testing.comparison import Comparison
from utils.testing.contenders import Contender
from utils.testing.metrics import METRICS, ClassScores, Sample, find_defects, mean_over_classes
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
    earlier: Sequence[Results] = (),
    after_batch: Callable[[], None] = lambda: None,
) -> Comparison:
    """Test models on a bench and compare them. `contenders` come after what they are compared with.

    `earlier` are results on the same bench with the same `resamples` and `seed`: these models are not tested again.
    `after_batch` may end the work by an exception.
    """
    known = {result.contender: result for result in earlier}
    tested = [Taken(contender) for contender in contenders if contender not in known]
    for class_name, scores in scores_by_class(bench, [taken.contender for taken in tested], after_batch):
        samples = [of_model.sample() for of_model in scores]
        # Drawn by class and seed alone, so that models which are tested apart have the same draws.
        draws = resample(samples, (seed, list(bench.data.descriptions).index(class_name)), resamples)
        for taken, of_model, sample, resampled in zip(tested, scores, samples, draws, strict=True):
            taken.samples[class_name] = sample
            taken.values[class_name] = of_model.metrics(sample)
            taken.resampled[class_name] = resampled
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
) -> Iterable[tuple[str, list[ClassScores]]]:
    """Each class as soon as its last image went through, and what every model said of its images."""
    records = bench.records
    left = Counter(record.class_name for record in records)
    in_hand: dict[str, list[ClassScores]] = {}  # at most the classes of one batch
    start = emptied = 0
    with progress(total=len(records), desc=bench.data.name, unit="image") as bar:
        for batch, found in bench.predictions(contenders, records, after_batch):
            names = batch["class_name"]
            defects = [find_defects(mask.numpy()) for mask in batch["mask"].squeeze(1)]
            emptied += int(batch["emptied"].sum())
            for class_name in dict.fromkeys(names):
                if class_name not in in_hand:
                    in_hand[class_name] = [
                        ClassScores(bench.data.domain, contender.checkpoint.calibration) for contender in contenders
                    ]
                rows = [row for row, name in enumerate(names) if name == class_name]
                for scores, prediction in zip(in_hand[class_name], found, strict=True):
                    scores.add(prediction, batch, rows, defects, start)
            start += len(names)
            left.subtract(names)
            for class_name in [name for name in in_hand if not left[name]]:
                yield class_name, in_hand.pop(class_name)
            bar.update(len(names))
    if emptied:
        logger.warning(
            "%s: %d masks are empty at the model's image size: no defect is found there.", bench.data.name, emptied
        )
