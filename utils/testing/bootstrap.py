"""How sure a result is: paired bootstrap over the images of each class.

Images are drawn with replacement within their class, the same draws for every model; metrics are averaged over classes
as ever. Intervals are standard intervals from the deviation of the resamples (Efron and Tibshirani, *An Introduction to
the Bootstrap*, 1993, chapters 12 and 13): on simulated data they hold the true value about as often as they say, closer
than percentiles do (benchmarks/coverage.py). They tell how much a result depends on the images of the test, not on the
seed of a training.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from utils.testing.metrics import METRICS, Sample

RESAMPLES = 1000
CONFIDENCE = 0.95
# Classes with fewer images of a kind have no interval: resamples of so few repeat the same ones.
MIN_IMAGES = 10
# Images times resamples in hand: 2 MB in float64, of which there are a dozen arrays.
BLOCK = 250_000


def enough(labels: np.ndarray) -> bool:
    """Whether there are enough images, of each kind that there is, for an interval."""
    return np.unique(labels, return_counts=True)[1].min() >= MIN_IMAGES


def draw(images: int, seed: tuple[int, ...], resamples: int) -> Iterator[np.ndarray]:
    """How often each image is in each resample, in blocks [some resamples, images]."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // images)
    for start in range(0, resamples, rows):
        yield rng.multinomial(images, np.full(images, 1 / images), size=min(rows, resamples - start)).astype(float)


def resample(samples: list[Sample], seed: tuple[int, ...], resamples: int = RESAMPLES) -> list[dict[str, np.ndarray]]:
    """{metric: its value in each resample [R]} of each model on one class; NaN where the class has too few images.

    Pixel metrics are as coarse as the histograms: fit to tell how much they vary, not what they are.
    """
    images = len(samples[0].labels)
    if not enough(samples[0].labels):
        return [{name: np.full(resamples, np.nan) for name in METRICS} for _ in samples]
    blocks = [[sample.metrics(times) for sample in samples] for times in draw(images, seed, resamples)]
    return [
        {name: np.concatenate([block[number][name] for block in blocks]) for name in METRICS}
        for number in range(len(samples))
    ]


def interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """The CONFIDENCE interval of a value from its resamples [R], without those that are undefined; NaN where most are.

    Value -+ z standard deviations of the resamples.
    """
    defined = resampled[np.isfinite(resampled)]
    if math.isnan(value) or len(defined) < max(2, len(resampled) / 2):
        return math.nan, math.nan
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * defined.std(ddof=1).item()
    return value - half, value + half
