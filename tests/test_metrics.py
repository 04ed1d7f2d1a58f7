"""Metrics against scikit-learn, and the published mixture of image scores."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from forward_utils_cross_attention import Prediction
from utils.metrics import METRICS, ClassScores, ScoreCounts, mean_over_classes, min_max, score_keys


def values(kind: str, rng: np.random.Generator) -> np.ndarray:
    return {
        "normal": rng.normal(0, 5, 20000),
        "far": 150 + rng.normal(0, 3, 20000),
        "tied": rng.integers(0, 6, 20000).astype(float),
        "constant": np.full(20000, 1.5),
        "tiny": np.array([0.1, 0.7, 0.7, -3.0]),
    }[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "far", "tied", "constant", "tiny"])
def test_counts_agree_with_scikit_learn(kind):
    rng = np.random.default_rng(0)
    scores = values(kind, rng)
    labels = (rng.random(len(scores)) < 0.1 + 0.1 * (scores > np.median(scores))).astype(int)
    labels[:2] = [0, 1]
    counts = ScoreCounts()
    for part in np.array_split(np.arange(len(scores)), 3):
        counts.add(torch.from_numpy(scores[part]), torch.from_numpy(labels[part]))
    auroc, average_precision = counts.auroc_ap()
    assert auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert average_precision == pytest.approx(average_precision_score(labels, scores), abs=1e-4)


def test_keys_keep_the_order():
    scores = torch.tensor([-math.inf, -3.0, -1e-6, -0.0, 0.0, 1e-6, 2.0, 2.001, 1e9, math.inf])
    keys = score_keys(scores)
    assert (keys[1:] >= keys[:-1]).all() and keys.min() >= 0
    assert keys[6] < keys[7]


def test_one_kind_alone_is_undefined():
    counts = ScoreCounts()
    assert all(math.isnan(value) for value in counts.auroc_ap())
    counts.add(torch.rand(10), torch.zeros(10))
    assert all(math.isnan(value) for value in counts.auroc_ap())


def fill(domain: str, maps: torch.Tensor, scores: torch.Tensor, labels: list[int], mask: torch.Tensor) -> ClassScores:
    kept = ClassScores(domain)
    batch = {"label": torch.tensor(labels), "has_mask": torch.ones(len(labels), dtype=torch.bool), "mask": mask}
    batch["path"] = [f"{i}.png" for i in range(len(labels))]
    kept.add(Prediction(maps, scores), batch, list(range(len(labels))))
    return kept


def test_published_image_score():
    maps = torch.tensor([[[0.0, 2.0]], [[1.0, 4.0]], [[3.0, -4.0]]])
    scores = torch.tensor([0.4, 0.6, 0.5])
    mask = torch.tensor([[[[0, 0]]], [[[0, 1]]], [[[1, 0]]]])
    kept = fill("industrial", maps, scores, [0, 1, 1], mask)
    # Maps scaled by the class's extremes -4 and 4: highest 0.75, 1, 0.875. Scores by 0.4 and 0.6: 0, 1, 0.5.
    assert kept.image_scores() == pytest.approx([0.375, 1.0, 0.6875])
    assert fill("medical", maps, scores, [0, 1, 1], mask).image_scores() == pytest.approx([0.75, 1.0, 0.875])
    assert kept.metrics()["image_auroc"] == 1.0


def test_min_max_as_published():
    assert min_max(np.array([0.5, 1.0]), 0.5, 1.0).tolist() == [0.5, 1.0]  # a maximum of 1 stays
    assert min_max(np.array([3.0, 3.0]), 3.0, 3.0).tolist() == [0.0, 0.0]
    assert min_max(np.array([2.0, 4.0]), 0.0, 4.0).tolist() == [0.5, 1.0]


def test_undefined_metrics_are_nan_and_left_out_of_the_average():
    maps, scores = torch.rand(2, 3, 3), torch.rand(2)
    all_normal = fill("industrial", maps, scores, [0, 0], torch.zeros(2, 1, 3, 3)).metrics()
    assert all(math.isnan(all_normal[name]) for name in METRICS)
    other = dict.fromkeys(METRICS, 0.5)
    assert mean_over_classes([all_normal, other]) == other
    assert all(math.isnan(value) for value in mean_over_classes([all_normal]).values())
    kept = ClassScores("industrial")
    mask = torch.zeros(2, 1, 3, 3)
    mask[1, 0, 0] = 1
    batch = {"label": torch.tensor([0, 1]), "has_mask": torch.tensor([True, False]), "mask": mask, "path": ["a", "b"]}
    kept.add(Prediction(maps, scores), batch, [0, 1])
    found = kept.metrics()
    assert math.isnan(found["pixel_ap"]) and not math.isnan(found["image_ap"])


def test_a_map_that_is_not_finite_names_its_image():
    maps = torch.zeros(2, 3, 3)
    maps[1, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1\.png: the model's map"):
        fill("industrial", maps, torch.zeros(2), [0, 1], torch.zeros(2, 1, 3, 3))
