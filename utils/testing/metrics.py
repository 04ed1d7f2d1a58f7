"""Metrics of one model on one class; NaN where one is undefined.

Pixel scores are counted as they come, so memory does not grow with the number of pixels; at most 4 KiB are kept of an
image. Libraries were looked at first: torchmetrics' binned curves and adeval count in bins of equal width, whose range
adeval wants to know before, and both miss average precision by 1e-3 where scores crowd; torchmetrics' exact curves and
anomalib's AUPRO keep every pixel. A key of 22 bits in the order of floats needs no range. Only pixels that share a key
can count wrongly, and a key is at most 1/4096 as wide as the score lies from the median of the class's first map. Where
maps of a class do not lie hundreds of times their spread apart, AUROC, AP, F1-max and AUPRO differ by less than 1e-4
from what every pixel's own score gives (tests/test_metrics.py).

Counts are whole numbers and nothing that is kept of an image depends on another, so several processes may share the
images: their parts, merged in any order, give the same metrics as one process to the last digit.
"""

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.loading import Batch
from forward_utils_cross_attention import Prediction
from utils.calibration import Calibration

logger = logging.getLogger(__name__)

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1", "pixel_aupro")
# By the published image score, which takes a whole class to compute.
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1")
# By the single-image score.
SINGLE_METRICS = ("single_auroc", "single_ap", "single_f1")
# By the calibrated decision.
DECISION_METRICS = ("decision_f1", "decision_accuracy")
METRICS = PIXEL_METRICS + IMAGE_METRICS + SINGLE_METRICS + DECISION_METRICS
# What tables and plots show of them: {metric: (group, title)}.
COLUMNS = {
    "pixel_auroc": ("pixel", "AUROC"),
    "pixel_ap": ("pixel", "AP"),
    "pixel_f1": ("pixel", "F1"),
    "pixel_aupro": ("pixel", "AUPRO"),
    "image_auroc": ("image", "AUROC"),
    "image_ap": ("image", "AP"),
    "image_f1": ("image", "F1"),
    "single_auroc": ("alone", "AUROC"),
    "decision_f1": ("decision", "F1"),
    "decision_accuracy": ("decision", "acc."),
}
KEY_BITS = 22
# AUPRO's usual limit of the false positive rate (https://doi.org/10.1007/s11263-020-01400-4).
FPR_LIMIT = 0.3


def score_keys(scores: Tensor) -> Tensor:
    """Finite float32 scores -> integers of KEY_BITS bits in the same order.

    The bits of a float, read as an integer, are in the order of its value (reversed for negative ones); the lowest of
    its 23 mantissa bits are dropped, so scores that differ by less than 1/8192 of their size may share a key.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    ordered = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)
    return ordered >> (32 - KEY_BITS)


def curve_metrics(
    normal: np.ndarray, anomalous: np.ndarray, overlap: np.ndarray | None = None, regions: np.ndarray | float = 0
) -> dict[str, np.ndarray]:
    """AUROC, AP, F1-max and AUPRO from how much of each kind has each score, highest score first; ties are one entry.

    `normal`, `anomalous` [..., K]: numbers of normal and anomalous pixels or images. `overlap` [..., K]: sum over the
    anomalous pixels of 1 / size of their region; `regions` [...]: number of regions. Leading axes are kept, so that all
    resamples of a bootstrap are one call. Returns {"auroc": [...], "ap", "f1", "aupro"} (AUPRO with `overlap` alone),
    NaN where a kind is absent.

    F1-max is the highest F1 of any threshold. AUPRO is the area under the mean overlap of regions over the false
    positive rate up to FPR_LIMIT, divided by it (Bergmann et al. 2021, https://doi.org/10.1007/s11263-020-01400-4).
    """
    false, true = np.cumsum(normal, axis=-1, dtype=float), np.cumsum(anomalous, axis=-1, dtype=float)
    negatives, positives = false[..., -1], true[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        # Of a pair that ties, half counts.
        auroc = (normal * (true - 0.5 * anomalous)).sum(axis=-1) / (negatives * positives)
        found = true + false
        precision = np.divide(true, found, out=np.zeros_like(true), where=found > 0)
        average_precision = (anomalous * precision).sum(axis=-1) / positives
        f1 = (2 * true / (found + positives[..., None])).max(axis=-1)
        metrics = {"auroc": auroc, "ap": average_precision, "f1": f1}
        if overlap is not None:
            mean_overlap = np.cumsum(overlap, axis=-1) / np.asarray(regions)[..., None]
            metrics["aupro"] = _limited_area(false / negatives[..., None], mean_overlap)
    defined = (negatives > 0) & (positives > 0)
    return {name: np.where(defined, value, np.nan) for name, value in metrics.items()}


def _limited_area(fpr: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Area under `overlap` over `fpr` [..., K], both rising from 0, up to FPR_LIMIT and divided by it."""
    start = np.zeros((*fpr.shape[:-1], 1))
    width = np.diff(np.minimum(fpr, FPR_LIMIT), axis=-1, prepend=start)
    step, rise = np.diff(fpr, axis=-1, prepend=start), np.diff(overlap, axis=-1, prepend=start)
    share = np.divide(width, step, out=np.zeros_like(step), where=step > 0)  # of a step that the limit cuts
    return (width * (overlap - rise + 0.5 * rise * share)).sum(axis=-1) / FPR_LIMIT


class Defects(NamedTuple):
    """The ground truth of an image: `mask` [S, S] of bool, `weights` [S, S], 1 / size of each defect pixel's region
    (0 elsewhere), and the number of `regions`.
    """

    mask: np.ndarray
    weights: np.ndarray
    regions: int


def find_defects(mask: np.ndarray) -> Defects:
    """The defects of a mask [S, S]: regions are connected by sides or corners."""
    mask = mask > 0
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    weights = 1 / np.maximum(np.bincount(labels.ravel(), minlength=count), 1)
    weights[0] = 0
    return Defects(mask, weights[labels], count - 1)


class PixelCounts:
    """How many normal and anomalous pixels have each key, and how much of the defects' regions: exact but for the keys.

    Keys are of what a score lies above or below `middle`, where they are finest: the median of the first map, unless
    given. Counts around the same middle merge, and do not depend on who counted which image, or when. At most 128 MiB,
    whatever the number of images; a system that hands out memory as it is touched gives few of them.
    """

    def __init__(self, middle: float | None = None) -> None:
        self.middle = middle
        self.regions = 0
        # Normal pixels, anomalous pixels, and shares of regions. Shares are whole multiples of 2**-60, for sums that no
        # order changes; in two parts of 30 bits, so that only 2**33 pixels of one key would overflow.
        self.counts = np.zeros((4, 1 << KEY_BITS), dtype=np.int64)

    def add(self, scores: Tensor, defects: Defects) -> None:
        """Count the pixels of one image, scores [S, S], finite."""
        if self.middle is None:
            self.middle = scores.median().item()
        keys = score_keys((scores.double() - self.middle).float()).cpu().numpy()
        normal, anomalous, coarse, fine = self.counts
        if not defects.regions:
            np.add.at(normal, keys.ravel(), 1)
            return
        inside = keys[defects.mask]
        shares = np.rint(defects.weights[defects.mask] * 2.0**60).astype(np.int64)
        np.add.at(normal, keys[~defects.mask], 1)
        np.add.at(anomalous, inside, 1)
        np.add.at(coarse, inside, shares >> 30)
        np.add.at(fine, inside, shares & ((1 << 30) - 1))
        self.regions += defects.regions

    def state(self) -> dict[str, Any]:
        """What another process needs to `merge` it: `counts` that are not 0, and their places in the flat array."""
        places = np.flatnonzero(self.counts)
        counts = self.counts.ravel()[places]
        return {"middle": self.middle, "regions": self.regions, "places": places.astype(np.int32), "counts": counts}

    def merge(self, state: dict[str, Any]) -> None:
        """Add what was counted elsewhere. ValueError where it was counted around another middle."""
        if self.middle is None:
            self.middle = state["middle"]
        if state["middle"] not in (None, self.middle):
            raise ValueError(f"Pixels counted around {state['middle']} do not merge with those around {self.middle}.")
        self.regions += state["regions"]
        self.counts.reshape(-1)[state["places"]] += state["counts"]  # each place is there once

    def metrics(self) -> dict[str, float]:
        """AUROC, AP, F1-max and AUPRO of all pixels; NaN where one of the two kinds is absent."""
        used = np.flatnonzero(self.counts[0] + self.counts[1])[::-1]  # highest score first
        if not len(used):
            return dict.fromkeys(("auroc", "ap", "f1", "aupro"), math.nan)
        normal, anomalous, coarse, fine = self.counts[:, used]
        found = curve_metrics(normal, anomalous, coarse * 2.0**-30 + fine * 2.0**-60, self.regions)
        return {name: float(value) for name, value in found.items()}


class ImageHistograms:
    """A small histogram of each image's pixels, for resampling and for ranking.

    Bins are 2**exponent wide and lie at multiples of that. Those of an image are as narrow as they can be for BINS of
    them to hold it, so that no image changes what is kept of another; `stacked` joins them until BINS hold all images.
    Kept per image: 12 bytes a bin.
    """

    BINS = 256

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf  # of all images
        # Of each image: exponent, and highest bin, counted from the one that starts at a score of 0.
        self.bins: list[tuple[int, int]] = []
        # Normal pixels, anomalous pixels and share of the regions; images; bins, highest score first. In one block that
        # grows by doubling: many small ones among the maps that come and go would leave memory in pieces.
        self.counts = np.zeros((3, 64, self.BINS), dtype=np.float32)

    def add(self, scores: np.ndarray, defects: Defects) -> None:
        """Take in one image, float32 scores [S, S], finite."""
        low, high = float(scores.min()), float(scores.max())
        exponent, top = self._bins(low, high)
        # In float64, where powers of two change no digit.
        places = top - np.floor(scores.astype(np.float64) * 2.0**-exponent).astype(np.int64)
        inside = places[defects.mask]
        own = self._append([(exponent, top)], low, high)[:, 0]
        own[0] = np.bincount(places[~defects.mask], minlength=self.BINS)
        own[1] = np.bincount(inside, minlength=self.BINS)
        shares = np.bincount(inside, weights=defects.weights[defects.mask], minlength=self.BINS)
        own[2] = np.rint(shares * 2**24) / 2**24  # float64 sums of these are exact: no order or thread changes them

    def _bins(self, low: float, high: float) -> tuple[int, int]:
        """Exponent of the narrowest bins of which BINS hold all scores from `low` to `high`, and the highest of them.

        A range around another has no narrower bins. None are narrower than float32 scores lie apart.
        """
        spacing = max(math.ulp(max(-low, high)) * 2**29, 2.0**-149)  # a float64 has 29 bits more
        exponent = math.frexp(max((high - low) / self.BINS, spacing / 2))[1]
        while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= self.BINS:
            exponent += 1
        return exponent, math.floor(math.ldexp(high, -exponent))

    def _append(self, bins: list[tuple[int, int]], low: float, high: float) -> np.ndarray:
        """Room [3, images, BINS] for the counts of more images, which have these `bins` and extremes."""
        start = len(self.bins)
        self.bins += bins
        while len(self.bins) > self.counts.shape[1]:
            self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)], axis=1)
        self.low, self.high = min(self.low, low), max(self.high, high)
        return self.counts[:, start : len(self.bins)]

    def state(self) -> dict[str, Any]:
        """What another process needs to `merge` it."""
        return {"bins": self.bins, "low": self.low, "high": self.high, "counts": self.counts[:, : len(self.bins)]}

    def merge(self, state: dict[str, Any]) -> None:
        """Take in the images of another process, after those that are here."""
        self._append(state["bins"], state["low"], state["high"])[:] = state["counts"]

    def arrange(self, order: list[int]) -> None:
        """Bring the images into the `order` of these numbers, each once."""
        self.bins = [self.bins[image] for image in order]
        self.counts[:, : len(order)] = self.counts[:, order]

    def stacked(self) -> np.ndarray:
        """[3, images, BINS] in the same bins, highest score first."""
        stacked = np.zeros((3, len(self.bins), self.BINS), dtype=np.float32)
        if not self.bins:
            return stacked
        common, highest = self._bins(self.low, self.high)
        for image, (exponent, top) in enumerate(self.bins):
            joined = (top - np.arange(self.BINS)) >> (common - exponent)  # halved and rounded down, as often
            places = (highest - joined).clip(0, self.BINS - 1)  # what is beyond is empty
            for kind in range(3):
                stacked[kind, image] = np.bincount(places, self.counts[kind, image], minlength=self.BINS)
        return stacked


def image_pixel_ap(scores: np.ndarray, defects: Defects) -> float:
    """Pixel AP of one image, scores [S, S], exact: its pixels are sorted. NaN without a defect."""
    if not defects.regions:
        return math.nan
    order = np.argsort(scores, axis=None)[::-1]
    ranked, found = scores.ravel()[order], np.cumsum(defects.mask.ravel()[order])
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of pixels that tie
    precision, anomalous = found[last] / (last + 1), np.diff(found[last], prepend=0)
    return float((precision * anomalous).sum() / found[-1])


def min_max(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale by the extremes of a class, as published: unchanged where the maximum is 1, zeros where all are equal."""
    if high == 1:
        return values
    if high == low:
        return np.zeros_like(values)
    return (values - low) / (high - low)


@dataclass(frozen=True)
class Sample:
    """What is kept of n images of one class, as one model sees them.

    `labels` [n] of 0 and 1; `published_scores` [n] and `single_scores` [n] of the images;
    `pixel_ap` [n], of each image, NaN without a defect; `probabilities` and `decisions` [n] of 0 and 1, None without a
    calibration; `pixels` [3, n, bins] of
    `ImageHistograms`, None where a mask is missing; `regions` [n], numbers of defects; `low` and `high`, the
    extremes of the class's maps.
    """

    paths: list[str]
    labels: np.ndarray
    published_scores: np.ndarray
    single_scores: np.ndarray
    pixel_ap: np.ndarray
    probabilities: np.ndarray | None
    decisions: np.ndarray | None
    pixels: np.ndarray | None
    regions: np.ndarray
    low: float
    high: float

    def metrics(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: [R]} with each image counted `times` [R, n]; pixel metrics as precise as the histograms."""
        found = {f"image_{name}": value for name, value in _ranked(self.labels, self.published_scores, times).items()}
        found |= {f"single_{name}": value for name, value in _ranked(self.labels, self.single_scores, times).items()}
        if self.decisions is not None:
            hits, right = times @ (self.decisions * self.labels), times @ (self.decisions == self.labels)
            named = times @ (self.decisions + self.labels)
            with np.errstate(invalid="ignore", divide="ignore"):
                found["decision_f1"] = np.where(times @ self.labels > 0, 2 * hits / named, np.nan)
            found["decision_accuracy"] = right / times.sum(axis=-1)
        if self.pixels is not None:
            normal, anomalous, overlap = (times @ kind.astype(np.float64) for kind in self.pixels)
            pixel = curve_metrics(normal, anomalous, overlap, times @ self.regions)
            found |= {f"pixel_{name}": value for name, value in pixel.items()}
        return {name: found.get(name, np.full(len(times), np.nan)) for name in METRICS}


def _ranked(labels: np.ndarray, scores: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC, AP and F1-max [R] of image scores [n], each image counted `times` [R, n]."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # ties are one entry
    kinds = (np.add.reduceat(times[:, order] * kind[order], starts, axis=1) for kind in (1 - labels, labels))
    return curve_metrics(*kinds)


@dataclass
class ClassScores:
    """Takes in one model's predictions on one class, batch by batch.

    Several processes may each take in some batches: what they have, merged, is to the last digit what one process would
    have. All but the one with the first image are given `pixels` around the `middle` that it found.
    """

    domain: str
    calibration: Calibration | None = None
    numbers: list[int] = field(default_factory=list)  # of the images in the data set
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    detection_scores: list[float] = field(default_factory=list)
    single_scores: list[float] = field(default_factory=list)
    highest: list[float] = field(default_factory=list)  # of each map
    lowest: list[float] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    pixel_ap: list[float] = field(default_factory=list)  # of each image
    pixels: PixelCounts = field(default_factory=PixelCounts)
    histograms: ImageHistograms = field(default_factory=ImageHistograms)
    maskless: bool = False

    def add(self, prediction: Prediction, batch: Batch, rows: list[int], defects: list[Defects], start: int) -> None:
        """Take in the `rows` of a batch that are of this class, all finite.

        `defects` are of the whole batch; `start` is the number of its first image in the data set.
        """
        maps = prediction.maps[rows]
        self.numbers += [start + row for row in rows]
        self.paths += [batch["path"][row] for row in rows]
        self.labels += batch["label"][rows].tolist()
        self.detection_scores += prediction.detection_scores[rows].tolist()
        self.single_scores += prediction.single_scores[rows].tolist()
        self.highest += maps.amax(dim=(1, 2)).tolist()
        self.lowest += maps.amin(dim=(1, 2)).tolist()
        self.maskless |= not batch["has_mask"][rows].all().item()
        for one, row in zip(maps, rows, strict=True):
            self.pixels.add(one, defects[row])
            self.histograms.add(one.cpu().numpy(), defects[row])
            self.regions.append(defects[row].regions)
            self.pixel_ap.append(image_pixel_ap(one.cpu().numpy(), defects[row]))

    def state(self) -> dict[str, Any]:
        """What another process needs to `merge` it: numbers, texts, lists and arrays."""
        images = {name: getattr(self, name) for name in PER_IMAGE}
        parts = {"pixels": self.pixels.state(), "histograms": self.histograms.state()}
        return {"images": images, "maskless": self.maskless} | parts

    def merge(self, state: dict[str, Any]) -> None:
        """Take in what another process did of the class; images are then in the order of their numbers.

        ValueError where pixels were counted around different middles.
        """
        self.pixels.merge(state["pixels"])
        self.histograms.merge(state["histograms"])
        self.maskless |= state["maskless"]
        order = np.argsort(self.numbers + state["images"]["numbers"]).tolist()
        self.histograms.arrange(order)
        for name in PER_IMAGE:
            values = getattr(self, name) + state["images"][name]
            setattr(self, name, [values[image] for image in order])

    def published_scores(self) -> np.ndarray:
        """The published image scores: half the detection score, half the highest map value, both min-max scaled.

        The extremes are those of the class. Medical: the highest map value alone.
        """
        scores, highest = np.asarray(self.detection_scores), np.asarray(self.highest)
        lowest = min(self.lowest)
        if lowest == highest.max() or scores.min() == scores.max():
            logger.warning(
                "All %s of a class are equal: they count as 0.", "maps" if lowest == highest.max() else "scores"
            )
        scaled = min_max(highest, lowest, highest.max())
        if self.domain == "medical":
            return scaled
        return 0.5 * min_max(scores, scores.min(), scores.max()) + 0.5 * scaled

    def sample(self) -> Sample:
        """What is kept of the class."""
        probabilities = decisions = None
        if self.calibration is not None:
            probabilities = self.calibration.probabilities(np.asarray(self.detection_scores), np.asarray(self.highest))
            decisions = self.calibration.decisions(probabilities).astype(int)
        return Sample(
            paths=self.paths,
            labels=np.asarray(self.labels),
            published_scores=self.published_scores(),
            single_scores=np.asarray(self.single_scores),
            pixel_ap=np.asarray(self.pixel_ap),
            probabilities=probabilities,
            decisions=decisions,
            pixels=None if self.maskless else self.histograms.stacked(),
            regions=np.asarray(self.regions),
            low=min(self.lowest),
            high=max(self.highest),
        )

    def metrics(self, sample: Sample) -> dict[str, float]:
        """{metric: value in [0, 1], or NaN where it is undefined} of the `sample` of this class."""
        found = {name: value.item() for name, value in sample.metrics(np.ones((1, len(self.labels)))).items()}
        if not self.maskless:
            found |= {f"pixel_{name}": value for name, value in self.pixels.metrics().items()}
        return found


# What is listed of each image.
PER_IMAGE = [kept.name for kept in fields(ClassScores) if kept.default_factory is list]


def mean_over_classes(per_class: list[dict]) -> dict:
    """Average of each metric over the classes where it is defined: of numbers, or of arrays [R] over resamples.

    A resample in which one of these classes lacks a kind of image has no average.
    """
    means = {}
    for name in METRICS:
        values = np.stack([np.atleast_1d(metrics[name]) for metrics in per_class])
        values = values[~np.isnan(values).all(axis=1)]
        mean = values.mean(axis=0) if len(values) else np.full(values.shape[1], np.nan)
        means[name] = mean if np.ndim(per_class[0][name]) else mean.item()
    return means
