"""Metrics of AA-CLIP's protocol, class by class; NaN where one is undefined.

Pixel scores are counted as they come, so memory does not grow with the number of images.
"""

import logging
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from forward_utils_cross_attention import Prediction

logger = logging.getLogger(__name__)

METRICS = ("pixel_auroc", "pixel_ap", "image_auroc", "image_ap")
KEY_BITS = 22


def score_keys(scores: Tensor) -> Tensor:
    """Finite float32 scores -> integers of KEY_BITS bits in the same order.

    The bits of a float, read as an integer, are in the order of its value (reversed for negative ones); the lowest of
    its 23 mantissa bits are dropped, so scores that differ by less than 1/8192 of their size may share a key.
    """
    bits = scores.contiguous().view(torch.int32).long()
    ordered = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)
    return ordered >> (32 - KEY_BITS)


class ScoreCounts:
    """How many normal and anomalous scores have each key; AUROC and AP of all of them, with ties."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, 1 << KEY_BITS), dtype=np.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count scores (finite) with labels of 0 and 1 of the same shape."""
        keys = score_keys(scores.flatten()).cpu().numpy()
        positive = labels.flatten().cpu().numpy().astype(bool)
        for row, chosen in enumerate((~positive, positive)):
            np.add.at(self.counts[row], keys[chosen], 1)

    def auroc_ap(self) -> tuple[float, float]:
        """Area under the ROC curve and average precision; NaN where one of the two kinds is absent."""
        negatives, positives = self.counts[:, ::-1]  # highest score first
        used = (negatives + positives) > 0
        false, true = np.cumsum(negatives[used]), np.cumsum(positives[used])
        if not used.any() or not false[-1] or not true[-1]:
            return math.nan, math.nan
        recall = np.concatenate([[0.0], true / true[-1]])
        fall_out = np.concatenate([[0.0], false / false[-1]])
        average_precision = np.sum(np.diff(recall) * true / (true + false))
        return float(np.trapezoid(recall, fall_out)), float(average_precision)


def min_max(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale by the extremes of a class, as published: unchanged where the maximum is 1, zeros where all are equal."""
    if high == 1:
        return values
    if high == low:
        return np.zeros_like(values)
    return (values - low) / (high - low)


@dataclass
class ClassScores:
    """All that is kept of one model's results on one class."""

    domain: str
    labels: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    highest: list[float] = field(default_factory=list)  # of each map
    lowest: list[float] = field(default_factory=list)
    pixels: ScoreCounts = field(default_factory=ScoreCounts)
    maskless: bool = False

    def add(self, prediction: Prediction, batch: dict, rows: list[int]) -> None:
        """Take in the `rows` of a batch that are of this class. Raises ValueError for a map that is not finite."""
        maps, scores = prediction.maps[rows], prediction.scores[rows]
        finite = maps.flatten(1).isfinite().all(dim=1) & scores.isfinite()
        if not finite.all():
            path = batch["path"][rows[finite.tolist().index(False)]]
            raise ValueError(f"{path}: the model's map or score is not finite.")
        self.labels += batch["label"][rows].tolist()
        self.scores += scores.tolist()
        self.highest += maps.amax(dim=(1, 2)).tolist()
        self.lowest += maps.amin(dim=(1, 2)).tolist()
        self.maskless |= not batch["has_mask"][rows].all().item()
        self.pixels.add(maps, batch["mask"][rows].squeeze(1))

    def image_scores(self) -> np.ndarray:
        """The published image score: half the detection score, half the highest map value, both min-max scaled.

        The extremes are those of the class. Medical: the highest map value alone.
        """
        scores, highest = np.asarray(self.scores), np.asarray(self.highest)
        lowest = min(self.lowest)
        if lowest == highest.max() or scores.min() == scores.max():
            logger.warning(
                "All %s of a class are equal: they count as 0.", "maps" if lowest == highest.max() else "scores"
            )
        scaled = min_max(highest, lowest, highest.max())
        if self.domain == "medical":
            return scaled
        return 0.5 * min_max(scores, scores.min(), scores.max()) + 0.5 * scaled

    def metrics(self) -> dict[str, float]:
        """{metric: value in [0, 1], or NaN where it is undefined}."""
        auroc, average_precision = self.pixels.auroc_ap()
        if self.maskless:
            auroc = average_precision = math.nan
        labels, scores = np.asarray(self.labels), self.image_scores()
        both = 0 < labels.sum() < len(labels)
        return {
            "pixel_auroc": auroc,
            "pixel_ap": average_precision,
            "image_auroc": float(roc_auc_score(labels, scores)) if both else math.nan,
            "image_ap": float(average_precision_score(labels, scores)) if both else math.nan,
        }


def mean_over_classes(per_class: list[dict[str, float]]) -> dict[str, float]:
    """Average of each metric over the classes where it is defined."""
    means = {}
    for name in METRICS:
        values = [metrics[name] for metrics in per_class if not math.isnan(metrics[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means
