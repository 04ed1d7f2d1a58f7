"""From raw scores to the probability that an image is anomalous, and to a decision.

A logistic regression on the detection score and the highest raw map value, so that an image is judged alone. It is
fitted at the end of each loop on images of training, never on those of a test.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

# Map values are counted in bins of that width, within limits that cosines of four levels, times 100, keep far from.
BIN_WIDTH, MOST_VALUE = 1 / 256, 1024
BINS = int(2 * MOST_VALUE / BIN_WIDTH)


@dataclass(frozen=True)
class Calibration:
    """probability = sigmoid(intercept + detection weight x detection score + map weight x highest map value).

    An image is called anomalous from `threshold` on. `held_out` tells whether the `images` it was fitted on had not
    been trained on; where they had, probabilities and decisions are optimistic. `map_range` is the lowest and the
    highest map value of these images: a scale for pictures that does not depend on the picture. From `map_threshold`
    on a pixel is called a defect; None where no image has a mask, and in files of older runs.
    """

    detection_weight: float
    map_weight: float
    intercept: float
    threshold: float
    map_range: tuple[float, float]
    images: int
    held_out: bool
    map_threshold: float | None = field(default=None, metadata={"added": True})

    def probabilities(self, detection_scores: np.ndarray, highest: np.ndarray) -> np.ndarray:
        """Detection scores and highest map values [n] -> probabilities [n]."""
        logits = self.intercept + self.detection_weight * detection_scores + self.map_weight * highest
        return 0.5 * (1 + np.tanh(0.5 * logits))  # the sigmoid, without overflow

    def decisions(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities -> whether the images are called anomalous."""
        return probabilities >= self.threshold


def fit(
    detection_scores: Sequence[float],
    highest: Sequence[float],
    labels: Sequence[int],
    map_range: tuple[float, float],
    held_out: bool,
    map_threshold: float | None = None,
) -> Calibration | None:
    """Fit on n images; None where all are of one kind, so that there is nothing to tell apart.

    Both kinds weigh the same, whatever their numbers. The threshold has the highest F1 on these images; it lies halfway
    to the next lower probability, at 0 where there is none.
    """
    # Here, because what only reads a calibration would wait a second for scikit-learn.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kinds = np.asarray(labels)
    if len(set(kinds.tolist())) < 2:
        return None
    features = np.stack([detection_scores, highest], axis=1).astype(float)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    model.fit(features, kinds)
    scaler, regression = model[0], model[-1]
    weights = regression.coef_[0] / scaler.scale_
    fitted = Calibration(
        detection_weight=float(weights[0]),
        map_weight=float(weights[1]),
        intercept=float(regression.intercept_[0] - weights @ scaler.mean_),
        threshold=0.5,
        map_range=map_range,
        images=len(kinds),
        held_out=held_out,
        map_threshold=map_threshold,
    )
    return replace(fitted, threshold=_best_threshold(kinds, fitted.probabilities(features[:, 0], features[:, 1])))


class MapCounts:
    """How many pixels have which map value, normal ones and defects apart: 8 MiB, whatever the number of images."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, BINS), dtype=np.int64)

    def add(self, maps: np.ndarray, masks: np.ndarray) -> None:
        """Count pixels: map values and 0 or 1, of one shape."""
        bins = ((maps + MOST_VALUE) / BIN_WIDTH).astype(np.int64).clip(0, BINS - 1)
        self.counts += np.bincount((masks.astype(np.int64) * BINS + bins).ravel(), minlength=2 * BINS).reshape(2, BINS)

    def best_threshold(self) -> float | None:
        """The map value with the highest F1 of calling pixels defects from it on; None where there is no defect."""
        normal, defects = np.cumsum(self.counts[:, ::-1], axis=1)[:, ::-1]
        if not defects[0]:
            return None
        f1 = 2 * defects / (defects + normal + defects[0])
        best = np.flatnonzero(f1 == f1.max())
        # Halfway through the values that are as good, as the one of probabilities.
        last = best[0] + np.flatnonzero(np.diff(best, append=-1) != 1)[0]
        return float(best[0] + last) / 2 * BIN_WIDTH - MOST_VALUE


def _best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = thresholds[f1[:-1].argmax()]
    below = probabilities[probabilities < best]
    return float((best + below.max()) / 2) if len(below) else 0.0
