"""Metrics against scikit-learn and a plain AUPRO, and the published mixture of image scores."""

import itertools
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from forward_utils_cross_attention import Prediction
from utils.calibration import Calibration
from utils.testing.metrics import (
    METRICS,
    ClassScores,
    ImageHistograms,
    PixelCounts,
    curve_metrics,
    find_defects,
    image_pixel_ap,
    mean_over_classes,
    min_max,
    score_keys,
)

KINDS = ["random", "far", "crowded", "tied", "constant", "tiny"]


def maps_and_masks(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Maps and masks [images, S, S]: defects are rectangles, and higher scores lean towards them."""
    rng = np.random.default_rng(KINDS.index(kind))
    shape = (2, 2, 2) if kind == "tiny" else (8, 40, 40)
    masks = np.zeros(shape, dtype=bool)
    for mask in masks[::2]:
        for _ in range(1 if kind == "tiny" else 3):
            top, left = rng.integers(0, shape[1] - shape[1] // 4, 2)
            mask[top : top + rng.integers(1, 12), left : left + rng.integers(1, 12)] = True
    leaning = rng.normal(0, 1, shape) + 1.5 * masks
    maps = {
        "random": 5 * leaning,
        "far": 150 + 3 * leaning,
        "crowded": 1 + 0.01 * leaning,
        "tied": np.round(2 * leaning),
        "constant": np.full(shape, 1.5),
        "tiny": leaning,
    }[kind]
    return maps.astype(np.float32), masks


def plain_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """AUPRO by its definition: every threshold, every region, then the area up to the limit by trapezoids."""
    regions = [
        (number, label == index)
        for number, mask in enumerate(masks)
        for label, count in [ndimage.label(mask, structure=np.ones((3, 3)))]
        for index in range(1, count + 1)
    ]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        overlap = np.mean([found[number][region].mean() for number, region in regions])
        points.append(((found & ~masks).sum() / (~masks).sum(), overlap))
    fpr, overlap = np.array(points).T
    inside = fpr <= limit
    ends = np.interp(limit, fpr, overlap) if not inside.all() else overlap[-1]
    x, y = np.append(fpr[inside], limit), np.append(overlap[inside], ends)
    return float(np.trapezoid(y, x) / limit)


def count(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    counts = PixelCounts()
    for one, mask in zip(maps, masks, strict=True):
        counts.add(torch.from_numpy(one), find_defects(mask))
    return counts.metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_metrics_agree_with_every_pixels_own_score(kind):
    maps, masks = maps_and_masks(kind)
    found, labels, scores = count(maps, masks), masks.ravel(), maps.ravel()
    precision, recall, _ = precision_recall_curve(labels, scores)
    expected = {
        "auroc": roc_auc_score(labels, scores),
        "ap": average_precision_score(labels, scores),
        "f1": (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max(),
        "aupro": plain_aupro(maps, masks),
    }
    assert found == pytest.approx(expected, abs=1e-4)


def test_aupro_by_hand():
    """Two regions, of 1 and 3 pixels, that touch at a corner with nothing else are one by 8-connectivity."""
    mask = np.zeros((1, 4, 5), dtype=bool)
    mask[0, 0, 0] = mask[0, 3, 1:4] = True
    scores = np.zeros((1, 4, 5), dtype=np.float32)
    scores[mask] = 3
    assert count(scores, mask)["aupro"] == pytest.approx(1)
    scores[0, 3, 1:4] = 0  # the larger region is found with the last normal pixel only
    # Half of the regions at no false positive; then a straight line to (1, 1), of which 0.3 counts.
    assert count(scores, mask)["aupro"] == pytest.approx(0.5 + 0.5 * 0.3 / 2, abs=1e-6)
    mask[0, 1, 1] = True
    assert find_defects(mask[0]).regions == 2
    mask[0, 2, 0] = True
    assert find_defects(mask[0]).regions == 1


def test_keys_keep_the_order():
    scores = torch.tensor([-math.inf, -3.0, -1e-6, -0.0, 0.0, 1e-6, 2.0, 2.001, 1e9, math.inf])
    keys = score_keys(scores)
    assert (keys[1:] >= keys[:-1]).all() and keys.min() >= 0
    assert keys[3] == keys[4] and keys[6] < keys[7]


def test_one_kind_alone_is_undefined():
    assert all(math.isnan(value) for value in PixelCounts().metrics().values())
    maps, masks = maps_and_masks("random")
    for mask in (np.zeros_like(masks), np.ones_like(masks)):
        assert all(math.isnan(value) for value in count(maps, mask).values())


def test_curves_keep_leading_axes():
    rng = np.random.default_rng(0)
    normal, anomalous, overlap = rng.integers(0, 5, (3, 4, 7)).astype(float)
    together = curve_metrics(normal, anomalous, overlap, overlap.sum(axis=-1))
    for row in range(4):
        alone = curve_metrics(normal[row], anomalous[row], overlap[row], overlap[row].sum())
        assert {name: values[row].item() for name, values in together.items()} == pytest.approx(
            {name: value.item() for name, value in alone.items()}
        )


def batch_of(labels: list[int], masks: torch.Tensor) -> dict:
    paths = [f"{number}.png" for number in range(len(labels))]
    return {"label": torch.tensor(labels), "has_mask": torch.ones(len(labels), dtype=torch.bool), "path": paths} | {
        "mask": masks
    }


def fill(domain: str, maps: torch.Tensor, scores: torch.Tensor, batch: dict, calibration=None) -> ClassScores:
    kept = ClassScores(domain, calibration)
    defects = [find_defects(mask.numpy()) for mask in batch["mask"].squeeze(1)]
    prediction = Prediction(maps, scores, scores)
    for rows in np.array_split(np.arange(len(scores)), 2):
        kept.add(prediction, batch, rows.tolist(), defects, 0)
    return kept


def metrics(kept: ClassScores) -> dict[str, float]:
    return kept.metrics(kept.sample())


def test_published_image_score():
    maps = torch.tensor([[[0.0, 2.0]], [[1.0, 4.0]], [[3.0, -4.0]]])
    scores = torch.tensor([0.4, 0.6, 0.5])
    batch = batch_of([0, 1, 1], torch.tensor([[[[0, 0]]], [[[0, 1]]], [[[1, 0]]]]))
    kept = fill("industrial", maps, scores, batch)
    # Maps scaled by the class's extremes -4 and 4: highest 0.75, 1, 0.875. Scores by 0.4 and 0.6: 0, 1, 0.5.
    assert kept.published_scores() == pytest.approx([0.375, 1.0, 0.6875])
    assert fill("medical", maps, scores, batch).published_scores() == pytest.approx([0.75, 1.0, 0.875])
    assert metrics(kept)["image_auroc"] == 1.0


def test_min_max_as_published():
    assert min_max(np.array([0.5, 1.0]), 0.5, 1.0).tolist() == [0.5, 1.0]  # a maximum of 1 stays
    assert min_max(np.array([3.0, 3.0]), 3.0, 3.0).tolist() == [0.0, 0.0]
    assert min_max(np.array([2.0, 4.0]), 0.0, 4.0).tolist() == [0.5, 1.0]


def random_class(images: int = 40, calibration=None) -> ClassScores:
    return fill("industrial", *random_maps(images), calibration)


def random_maps(images: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Maps, image scores and the batch of a class of which every other image has a defect."""
    rng = np.random.default_rng(3)
    labels = (np.arange(images) % 2).tolist()
    masks = torch.zeros(images, 1, 12, 12)
    masks[1::2, 0, 2:6, 3:8] = 1
    maps = torch.from_numpy(rng.normal(0, 1, (images, 12, 12)).astype(np.float32)) + masks.squeeze(1)
    scores = torch.from_numpy((rng.random(images) + 0.4 * np.array(labels)).astype(np.float32))
    return maps, scores, batch_of(labels, masks)


def test_image_metrics_agree_with_scikit_learn():
    kept = random_class(calibration=Calibration(4.0, 1.0, -5.0, 0.5, (0, 1), 10, True))
    sample, found = kept.sample(), metrics(kept)
    for name, scores in (("image", sample.published_scores), ("single", sample.single_scores)):
        precision, recall, _ = precision_recall_curve(sample.labels, scores)
        assert found[f"{name}_auroc"] == pytest.approx(roc_auc_score(sample.labels, scores))
        assert found[f"{name}_ap"] == pytest.approx(average_precision_score(sample.labels, scores))
        assert found[f"{name}_f1"] == pytest.approx((2 * precision * recall / (precision + recall)).max())
    assert 0 < sample.decisions.mean() < 1
    assert found["decision_f1"] == pytest.approx(f1_score(sample.labels, sample.decisions))
    assert found["decision_accuracy"] == pytest.approx((sample.labels == sample.decisions).mean())


def test_a_resample_is_a_class_with_images_repeated():
    kept = random_class()
    sample, times = kept.sample(), np.random.default_rng(0).integers(0, 4, 40)
    rows = np.repeat(np.arange(40), times)
    found = sample.metrics(times[None].astype(float))
    assert found["image_auroc"] == pytest.approx(roc_auc_score(sample.labels[rows], sample.published_scores[rows]))
    assert found["image_ap"] == pytest.approx(
        average_precision_score(sample.labels[rows], sample.published_scores[rows])
    )
    whole = {name: value.item() for name, value in sample.metrics(np.ones((1, 40))).items()}
    exact = kept.metrics(sample)
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1", "pixel_aupro"):
        assert whole[name] == pytest.approx(exact[name], abs=0.01)  # the histograms are coarse
        assert not math.isnan(found[name].item())


def histograms_of(images: list[np.ndarray], mask: np.ndarray) -> ImageHistograms:
    histograms = ImageHistograms()
    for scores in images:
        histograms.add(scores, find_defects(mask))
    return histograms


def plain_bins(scores: np.ndarray) -> np.ndarray:
    """Each score's bin, highest first: by the first power of two, from the spacing of floats, that is wide enough."""
    for exponent in itertools.count(max(np.frexp(np.abs(scores).max())[1] - 24, -149)):
        bins = np.floor(np.ldexp(scores.astype(float), -exponent))
        if bins.max() - bins.min() < ImageHistograms.BINS:
            return (bins.max() - bins).astype(int)


def test_histograms_hold_all_pixels_of_any_range():
    ranges = ((1, 1), (0, 3), (-900, 5), (2, 7000))
    images = [np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8) for low, high in ranges]
    stacked = histograms_of(images, np.zeros((8, 8))).stacked()
    assert stacked.shape == (3, 4, ImageHistograms.BINS)
    assert stacked[0].sum(axis=1).tolist() == [64] * 4 and not stacked[1:].any()
    first, last = (np.flatnonzero(stacked[0, number]) for number in (0, 3))
    assert len(first) == 1 and last[0] < first[0]  # highest score first
    assert ImageHistograms().stacked().shape == (3, 0, ImageHistograms.BINS)


@settings(deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12),
    order=st.permutations(range(3)),
    split=st.integers(0, 3),
)
def test_histograms_depend_neither_on_order_nor_on_who_saw_an_image(values, order, split):
    images = np.array(values, dtype=np.float32).reshape(3, 2, 2)
    mask = np.array([[0, 1], [0, 1]])
    whole = histograms_of(list(images), mask).stacked()
    assert (whole[0].sum(axis=1) == 2).all() and (whole[1].sum(axis=1) == 2).all() and (whole[2].sum(axis=1) == 1).all()
    merged = histograms_of([images[image] for image in order[:split]], mask)
    merged.merge(histograms_of([images[image] for image in order[split:]], mask).state())
    assert np.array_equal(merged.stacked(), whole[:, order])
    merged.arrange(np.argsort(order).tolist())
    assert np.array_equal(merged.stacked(), whole)
    expected = np.array(
        [np.bincount(bins, minlength=ImageHistograms.BINS) for bins in plain_bins(images)[:, mask == 0]]
    )
    assert np.array_equal(whole[0], expected)


def test_histograms_use_half_of_their_bins_or_more():
    rng = np.random.default_rng(0)
    for scale in 2.0 ** rng.uniform(-30, 30, 200):
        scores = (scale * (rng.uniform(-9, 9) + rng.random((16, 16)))).astype(np.float32)
        used = np.flatnonzero(histograms_of([scores], np.zeros((16, 16))).stacked()[0, 0])
        assert used[0] == 0 and ImageHistograms.BINS // 2 <= used[-1] < ImageHistograms.BINS


def test_at_most_4_kib_are_kept_of_an_image():
    sample = random_class().sample()
    arrays = (value for value in vars(sample).values() if isinstance(value, np.ndarray))
    assert sum(array.nbytes for array in arrays) / len(sample.labels) + 250 < 4096  # with a path of 250 bytes


def test_pixel_ap_of_each_image():
    kept = random_class()
    values = kept.sample().pixel_ap
    assert np.isnan(values[::2]).all() and (values[1::2] > 0.2).all()
    rng = np.random.default_rng(0)
    scores, mask = rng.normal(0, 1, (60, 60)).astype(np.float32), np.zeros((60, 60), dtype=bool)
    mask[5:20, 5:20] = True
    scores[mask] += 1
    scores[50, 50] = 150  # one pixel far away
    exact = average_precision_score(mask.ravel(), scores.ravel())
    assert image_pixel_ap(scores, find_defects(mask)) == pytest.approx(exact, abs=1e-12)
    tied = scores.round(1)
    exact = average_precision_score(mask.ravel(), tied.ravel())
    assert image_pixel_ap(tied, find_defects(mask)) == pytest.approx(exact, abs=1e-12)
    assert image_pixel_ap(np.ones((60, 60)), find_defects(mask)) == pytest.approx(mask.mean())


def test_a_first_map_apart_from_the_others_costs_little():
    maps, masks = maps_and_masks("random")
    maps[0] += 150  # its deviation is 5
    expected = average_precision_score(masks.ravel(), maps.ravel())
    assert count(maps, masks)["ap"] == pytest.approx(expected, abs=3e-4)


def test_undefined_metrics_are_nan_and_left_out_of_the_average():
    maps, scores = torch.rand(2, 3, 3), torch.rand(2)
    all_normal = metrics(fill("industrial", maps, scores, batch_of([0, 0], torch.zeros(2, 1, 3, 3))))
    assert all(math.isnan(all_normal[name]) for name in METRICS)
    other = dict.fromkeys(METRICS, 0.5)
    assert mean_over_classes([all_normal, other]) == other
    assert all(math.isnan(value) for value in mean_over_classes([all_normal]).values())
    mask = torch.zeros(2, 1, 3, 3)
    mask[1, 0, 0] = 1
    batch = batch_of([0, 1], mask) | {"has_mask": torch.tensor([True, False])}
    found = metrics(fill("industrial", maps, scores, batch))
    assert math.isnan(found["pixel_ap"]) and math.isnan(found["pixel_aupro"]) and not math.isnan(found["image_ap"])


def test_a_resample_without_one_kind_has_no_average():
    kinds = [{name: np.array(values) for name in METRICS} for values in ([1.0, np.nan], [0.5, 0.5], [np.nan, np.nan])]
    mean = mean_over_classes(kinds)["image_ap"]
    assert mean[0] == 0.75 and math.isnan(mean[1])


def shared(maps: torch.Tensor, scores: torch.Tensor, batch: dict, size: int, processes: int) -> list[ClassScores]:
    """What each process has of a class, from every so manyth batch of that size."""
    defects = [find_defects(mask.numpy()) for mask in batch["mask"].squeeze(1)]
    middle = maps[0].median().item()
    parts = [ClassScores("industrial", pixels=PixelCounts(middle if rank else None)) for rank in range(processes)]
    for number, start in enumerate(range(0, len(maps), size)):
        inside = slice(start, start + size)
        own = {name: values[inside] for name, values in batch.items()}
        prediction = Prediction(maps[inside], scores[inside], scores[inside])
        rows = list(range(len(own["path"])))
        parts[number % processes].add(prediction, own, rows, defects[inside], start)
    return parts


@settings(deadline=None, max_examples=15)
@given(
    size=st.integers(1, 9),
    processes=st.integers(1, 5),
    scale=st.sampled_from([1e-30, 1.0, 1e3]),
    random=st.randoms(use_true_random=False),
)
def test_processes_that_share_the_images_find_what_one_finds(size, processes, scale, random):
    maps, scores, batch = random_maps(30)
    maps = scale * maps * torch.rand(30, 1, 1, generator=torch.Generator().manual_seed(random.getrandbits(32)))
    (whole,) = shared(maps, scores, batch, 30, 1)
    first, *others = shared(maps, scores, batch, size, processes)
    random.shuffle(others)
    for part in others:
        first.merge(pickle.loads(pickle.dumps(part.state())))
    assert pickle.dumps(first.state()["images"]) == pickle.dumps(whole.state()["images"])
    assert np.array_equal(first.pixels.counts, whole.pixels.counts)
    np.testing.assert_equal(vars(first.sample()), vars(whole.sample()))
    np.testing.assert_equal(first.metrics(first.sample()), whole.metrics(whole.sample()))
    times = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=20).astype(float)
    np.testing.assert_equal(first.sample().metrics(times), whole.sample().metrics(times))


def test_pixels_counted_around_different_middles_do_not_merge():
    counts, other = PixelCounts(1.0), PixelCounts(2.0)
    with pytest.raises(ValueError, match=r"around 2\.0 do not merge with those around 1\.0"):
        counts.merge(other.state())
    counts.merge(PixelCounts().state())
    assert counts.middle == 1.0


def test_shares_of_regions_are_whole_numbers():
    mask = np.zeros((300, 300), dtype=bool)
    mask[::20, ::20], mask[10, :7], mask[150:, 1:19] = True, True, True
    defects = find_defects(mask)
    scores = np.random.default_rng(0).normal(0, 1, mask.shape).astype(np.float32)
    counts, histograms = PixelCounts(), ImageHistograms()
    counts.add(torch.from_numpy(scores), defects)
    histograms.add(scores, defects)
    coarse, fine = counts.counts[2:].sum(axis=1).tolist()
    assert (coarse * 2**30 + fine) / 2**60 == pytest.approx(defects.regions, abs=1e-12)
    shares = histograms.stacked()[2].astype(float)
    assert shares.sum() == pytest.approx(defects.regions, abs=1e-5)
    assert np.array_equal(shares * 2**24, np.rint(shares * 2**24))


def test_threads_that_sum_in_other_orders_change_no_resample():
    rng = np.random.default_rng(0)
    times, order = rng.integers(0, 4, (20, 40)).astype(float), rng.permutation(40)
    pixels = rng.integers(0, 2**22, (3, 40, ImageHistograms.BINS)).astype(np.float32)
    pixels[2] /= 2**24
    sample = replace(random_class().sample(), pixels=pixels)
    turned = replace(
        sample,
        labels=sample.labels[order],
        published_scores=sample.published_scores[order],
        single_scores=sample.single_scores[order],
        pixels=sample.pixels[:, order],
        regions=sample.regions[order],
    )
    np.testing.assert_equal(turned.metrics(times[:, order]), sample.metrics(times))
