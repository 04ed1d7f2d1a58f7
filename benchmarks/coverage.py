"""How often the bootstrap's 95 % intervals hold the true value, on simulated models and images.

    python -m benchmarks.coverage

Two models whose scores share most of their noise are compared on a test set of simulated images, many times anew. The
true difference of each metric is that on a very large set. The simulation is as hard as AA-CLIP's reported results on
MVTec: about 90 % pixel and image AUROC, 40 % pixel AP.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from utils.logs import progress
from utils.testing.bootstrap import interval, resample
from utils.testing.metrics import ImageHistograms, Sample, find_defects

# {what: (images, share that is anomalous)}
SETTINGS = {"100 images, half anomalous": (100, 0.5), "200 images, a quarter anomalous": (200, 0.25)}
MEASURED = ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "pixel_aupro")
SIDE = 16
TRUTH_IMAGES = 200_000
# How much each of the two models sees of an anomaly.
STRENGTHS = (2.0, 2.2)


def sample_of(rng: np.random.Generator, images: int, anomalous: float, strength: float = STRENGTHS[0]) -> Sample:
    """One simulated model's results on simulated images."""
    return next(iter(samples_of(rng, images, anomalous, (strength,))))


def samples_of(
    rng: np.random.Generator, images: int, anomalous: float, strengths: Iterable[float] = STRENGTHS
) -> list[Sample]:
    """Results of models that see the same images, with noise of which most is shared."""
    labels = (np.arange(images) < round(images * anomalous)).astype(int)
    masks = np.zeros((images, SIDE, SIDE), dtype=bool)
    for mask in masks[: labels.sum()]:  # views, the anomalous ones come first
        top, left = rng.integers(0, SIDE - 8, 2)
        mask[top : top + rng.integers(3, 9), left : left + rng.integers(3, 9)] = True
    defects = [find_defects(mask) for mask in masks]
    difficulty = rng.normal(0, 1, (images, 1, 1))  # of an image, for all models
    shared, scores = rng.normal(0, 1, masks.shape), rng.normal(0, 1, images)
    found = []
    for strength in strengths:
        maps = strength * masks * (1 + 0.5 * difficulty) + 0.3 * difficulty + shared
        maps = (maps + 0.5 * rng.normal(0, 1, masks.shape)).astype(np.float32)
        own = scores + strength * labels + 0.3 * rng.normal(0, 1, images)
        histograms = ImageHistograms()
        for one, defect in zip(maps, defects, strict=True):
            histograms.add(one, defect)
        found.append(
            Sample(
                paths=[],
                labels=labels,
                published_scores=own,
                single_scores=own,
                pixel_ap=np.full(images, np.nan),
                probabilities=None,
                decisions=None,
                pixels=histograms.stacked(),
                regions=np.array([defect.regions for defect in defects]),
                low=float(maps.min()),
                high=float(maps.max()),
            )
        )
    return found


def exact_metrics(sample: Sample) -> dict[str, float]:
    """Metrics of all images."""
    return {name: value.item() for name, value in sample.metrics(np.ones((1, len(sample.labels)))).items()}


@cache
def true_differences(anomalous: float, images: int = TRUTH_IMAGES) -> dict[str, float]:
    """Of the second model less the first, on very large sets: a mean over parts of 5000 images."""
    rng = np.random.default_rng(12345)
    parts = []
    for _ in range(images // 5000):
        first, second = (exact_metrics(sample) for sample in samples_of(rng, 5000, anomalous))
        parts.append([second[name] - first[name] for name in MEASURED])
    return dict(zip(MEASURED, np.mean(parts, axis=0).tolist(), strict=True))


def percentiles(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """The other common interval, to compare with."""
    low, high = np.nanquantile(resampled, (0.025, 0.975)).tolist()
    return low, high


def coverage(
    setting: str, rounds: int, resamples: int, kind: Callable = interval, truth_images: int = TRUTH_IMAGES
) -> dict[str, float]:
    """{metric: share of test sets whose interval, of that kind, of the difference holds the true one}."""
    images, anomalous = SETTINGS[setting]
    truth = true_differences(anomalous, truth_images)
    held = dict.fromkeys(MEASURED, 0)
    for number in progress(range(rounds), desc=setting, leave=False):
        samples = samples_of(np.random.default_rng((7, number)), images, anomalous)
        exact = [exact_metrics(sample) for sample in samples]
        first, second = resample(samples, (number,), resamples)
        for name in MEASURED:
            low, high = kind(exact[1][name] - exact[0][name], second[name] - first[name])
            held[name] += low <= truth[name] <= high
    return {name: count / rounds for name, count in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args()
    for setting in SETTINGS:
        print(f"{setting}: {args.rounds} test sets, {args.resamples} resamples each")
        found = [coverage(setting, args.rounds, args.resamples, kind) for kind in (interval, percentiles)]
        for name in MEASURED:
            print(f"  {name.replace('_', ' '):12} {found[0][name]:.1%}   by percentiles {found[1][name]:.1%}")


if __name__ == "__main__":
    main()
