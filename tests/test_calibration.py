"""Scores to probabilities and decisions."""

import numpy as np
import pytest

from utils.calibration import MapCounts, fit


def scores(images: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = (np.arange(images) % 4 == 0).astype(int)
    return 0.5 + 0.05 * labels + rng.normal(0, 0.03, images), 3 * labels + rng.normal(0, 2, images), labels


def test_probabilities_tell_both_kinds_apart_whatever_their_numbers():
    detection, highest, labels = scores()
    found = fit(detection, highest, labels, (-1, 5), held_out=True)
    probabilities = found.probabilities(detection, highest)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert probabilities[labels == 1].mean() > 0.7 and probabilities[labels == 0].mean() < 0.3
    assert found.detection_weight > 0 and found.map_weight > 0
    assert found.images == 200 and found.held_out and found.map_range == (-1, 5)
    assert found.probabilities(np.array([1e6, -1e6]), np.zeros(2)).tolist() == [1, 0]


def test_the_threshold_has_the_highest_f1():
    detection, highest, labels = scores()
    found = fit(detection, highest, labels, (0, 1), held_out=False)
    probabilities = found.probabilities(detection, highest)

    def f1(threshold: float) -> float:
        called = probabilities >= threshold
        return 2 * (called & (labels == 1)).sum() / (called.sum() + labels.sum())

    assert f1(found.threshold) == pytest.approx(max(f1(threshold) for threshold in probabilities))
    assert np.abs(probabilities - found.threshold).min() > 0  # between two images


def test_where_all_are_best_called_anomalous_all_are():
    rng = np.random.default_rng(0)
    labels = (np.arange(60) % 6 > 0).astype(int)
    detection, highest = rng.normal(0, 1, 60) - 0.1 * labels, rng.normal(0, 1, 60)
    found = fit(detection, highest, labels, (0, 1), held_out=False)
    assert found.decisions(found.probabilities(detection, highest)).mean() > 0.95


def test_a_pixel_is_called_a_defect_from_between_both_kinds_on():
    counts = MapCounts()
    assert counts.best_threshold() is None
    maps, masks = np.array([[0.0, 1.0], [7.0, 8.0]]), np.array([[0, 0], [1, 1]])
    counts.add(maps, masks)
    assert 3.9 < counts.best_threshold() < 4.1
    counts.add(np.full((2, 2), 7.5), np.array([[0, 1], [1, 1]]))
    assert 3.9 < counts.best_threshold() < 4.1
    counts.add(np.full((4, 4), 7.5), np.zeros((4, 4)))
    assert 7.5 < counts.best_threshold() <= 8 or counts.best_threshold() < 7


def test_one_kind_alone_cannot_be_calibrated():
    assert fit([0.1, 0.2], [1.0, 2.0], [1, 1], (0, 1), held_out=False) is None
