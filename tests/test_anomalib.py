"""Our model within anomalib: what its Engine tests, predicts and draws, beside what this program says."""

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.anomalib import COMPARED, DEFAULT, GIVEN, OWN, compare, table
from dataset.constants import describe_class
from dataset.sets import DataSet, open_dataset
from dataset.transforms import Transform
from tests.conftest import listing, write_mvtec_tree
from utils.judging import Detector

REASON = "needs requirements/anomalib.txt"
MVTecAD = pytest.importorskip("anomalib.data", reason=REASON).MVTecAD
Engine = pytest.importorskip("anomalib.engine", reason=REASON).Engine
bridge = importlib.import_module("bridges.anomalib")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of images that are read in this process


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_mvtec_tree(tmp_path_factory.mktemp("data") / "MVTecAD")


@pytest.fixture(scope="module")
def data(tree) -> DataSet:
    """The same as test.py opens it."""
    return open_dataset(str(tree), "nowhere")


@pytest.fixture(scope="module")
def compared(run, data, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """{program: {metric: value} of the class}."""
    return compare(run / "loop_2.pth", data, tmp_path_factory.mktemp("engine"))


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Iterator[Any]:
    """It writes into a folder of the test; the current one stays empty."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield Engine(default_root_dir=tmp_path / "engine", accelerator="cpu", devices=1, enable_progress_bar=False)
    assert not listing(here)


def images_of(tree: Path) -> Any:
    return MVTecAD(tree, "metal_nut", eval_batch_size=5, num_workers=0)


def verdicts(run: Path, tree: Path) -> dict[str, tuple[float, np.ndarray]]:
    """{image: its score and map} by this program, one by one."""
    detector = Detector.load(run / "loop_2.pth", describe_class("MVTec", "metal_nut")[0], device="cpu")
    found = {path: detector(path) for path in sorted((tree / "metal_nut/test").rglob("*.png"))}
    return {str(path): (verdict.single_score, verdict.map) for path, verdict in found.items()}


def test_metrics_are_those_of_this_program(compared):
    (own,), (given,) = compared[OWN], compared[GIVEN]
    # Image scores rank alike. Pixel metrics of ours differ by less than 1e-4 from those of every pixel's own score.
    for metric, value in given.items():
        assert value == pytest.approx(own[metric], abs=1e-4 if metric.startswith("pixel") else 1e-6), metric
    assert 0 < own["pixel_aupro"] < 1
    lines = table(compared).splitlines()
    assert len(lines) == 2 + len(COMPARED) and lines[-1].endswith("n/a | n/a | n/a |")


def test_the_post_processor_makes_ties_that_explain_what_it_changes(run, tree, engine, compared):
    model = bridge.CrossAttentionAAClip(run / "loop_2.pth", visualizer=False)
    engine.fit(model, datamodule=images_of(tree))  # which only validates
    known = model.post_processor
    judged = verdicts(run, tree)
    scores = np.array([score for score, _ in judged.values()])
    assert known.image_min.item() == pytest.approx(scores.min(), abs=1e-5)
    limited = ((scores - known.image_threshold.item()) / (scores.max() - scores.min()) + 0.5).clip(0, 1)
    labels = ["good" not in path for path in judged]
    (default,) = compared[DEFAULT]
    assert default["single_auroc"] == pytest.approx(roc_auc_score(labels, limited), abs=1e-6)


def test_predictions_are_those_of_this_program(run, tree, engine, caplog):
    caplog.set_level(logging.INFO, "bridges")
    model = bridge.CrossAttentionAAClip(run / "loop_2.pth", post_processor=False, visualizer=False)
    batches = engine.predict(model, datamodule=images_of(tree))
    assert f"The prompts say '{describe_class('MVTec', 'metal_nut')[0]}'" in caplog.text
    expected = verdicts(run, tree)
    found = {
        path: values for b in batches for path, *values in zip(b.image_path, b.pred_score, b.anomaly_map, strict=True)
    }
    assert found.keys() == expected.keys() and len(found) == 12
    for path, (score, anomaly_map) in found.items():
        # The same arithmetic on batches of another size: float32 rounds in another order. Maps are of the order of 10.
        assert score.item() == pytest.approx(expected[path][0], abs=1e-5)
        np.testing.assert_allclose(anomaly_map.numpy(), expected[path][1], atol=1e-3)
    masks = torch.cat([batch.gt_mask for batch in batches])
    assert masks.shape == torch.cat([batch.anomaly_map for batch in batches]).shape and masks.any()


def test_pictures_are_drawn(run, tree, engine, tmp_path):
    (found,) = engine.test(bridge.CrossAttentionAAClip(run / "loop_2.pth"), datamodule=images_of(tree), verbose=False)
    assert set(found) == {f"{kind}_{name}" for kind in ("image", "pixel") for name in ("AUROC", "F1Score")}
    drawn = sorted((tmp_path / "engine").rglob("*.png"))
    assert len(drawn) == 12
    with Image.open(drawn[0]) as picture:  # image, mask, map and decision side by side
        assert picture.size == (4 * 256, 256) and np.asarray(picture).std() > 10


def test_a_folder_is_judged_with_the_statistics_of_a_data_set(run, tree, engine, tmp_path, caplog):
    folder = tree / "metal_nut/test/bent"
    model = bridge.CrossAttentionAAClip(run / "loop_2.pth", class_name="washer", visualizer=False)
    with caplog.at_level(logging.INFO, "bridges"):
        plain = engine.predict(model, data_path=folder)
    assert "The prompts say 'washer'" in caplog.text and "No images of validation" in caplog.text
    expected = Detector.load(run / "loop_2.pth", "washer", device="cpu")(folder / "006.png")
    assert plain[0].pred_score.item() == pytest.approx(expected.single_score, abs=1e-5)
    caplog.clear()
    engine.fit(model, datamodule=images_of(tree))
    engine.trainer.save_checkpoint(tmp_path / "x.ckpt")
    judged = engine.predict(model, data_path=folder)
    again = bridge.CrossAttentionAAClip.load_from_checkpoint(tmp_path / "x.ckpt")
    loaded = engine.predict(again, data_path=folder)
    assert "No images of validation" not in caplog.text
    for one, other in zip(judged, loaded, strict=True):
        assert one.pred_score == other.pred_score and torch.equal(one.anomaly_map, other.anomaly_map)
    assert not all(torch.equal(one.pred_score, other.pred_score) for one, other in zip(judged, plain, strict=True))


def test_forward_takes_images_of_any_size(run):
    model = bridge.CrossAttentionAAClip(run / "loop_2.pth", post_processor=False)
    pixels = np.random.default_rng(1).integers(0, 255, (2, 50, 90, 3), dtype=np.uint8)
    found = model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    detector = Detector.load(run / "loop_2.pth", device="cpu")
    assert found.pred_score.tolist() == pytest.approx([detector(one).single_score for one in pixels], abs=1e-5)
    model.model._device = torch.device("meta")  # as where Lightning has moved the model
    assert torch.equal(model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).anomaly_map, found.anomaly_map)
    bare = bridge.CrossAttentionAAClip(run / "loop_2.pth", pre_processor=False)
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 64, 64\], found \[2, 3, 50, 90\]"):
        bare(torch.zeros(2, 3, 50, 90))
    with pytest.raises(ValueError, match="image 2 of a batch: the model's map or score is not finite"):
        bare(torch.stack([torch.zeros(3, 64, 64), torch.full((3, 64, 64), torch.nan)]))


@pytest.mark.parametrize(("height", "width"), [(48, 40), (33, 64), (64, 200), (64, 64)])
def test_images_and_masks_are_resized_as_this_program_does(height, width):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = rng.random((height, width)) > 0.7
    transform = Transform(64)
    normalised, expected = transform(Image.fromarray(pixels), Image.fromarray(mask.astype(np.uint8)))
    image = v2.functional.to_dtype(v2.functional.to_image(pixels), torch.float32, scale=True)  # as anomalib reads it
    image, found = bridge.PillowResize(64)(image, tv_tensors.Mask(torch.from_numpy(mask)))
    assert isinstance(image, tv_tensors.Image) and isinstance(found, tv_tensors.Mask) and found.dtype == torch.bool
    assert torch.equal(found, expected[0].bool())
    normalise = v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    assert torch.equal(normalise(image).as_subclass(torch.Tensor), normalised)
    assert bridge.PillowResize(9)(torch.tensor([-0.1, 0.5, 1.1]).expand(2, 3, 3, 3)).unique()[[0, -1]].tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ckpt": "nowhere.pth"}, FileNotFoundError, "nowhere.pth: no such checkpoint"),
        ({"ckpt": "."}, ValueError, "a run of 3 loops. Name one of its files"),
        ({"precision": "fp16"}, ValueError, "precision 'fp16': expected fp32 or bf16"),
        ({"domain": "space"}, ValueError, "domain 'space': expected industrial or medical"),
        ({"img_size": 32}, ValueError, "--img_size 32: contradicts"),
    ],
)
def test_what_is_wrong_is_said_as_elsewhere(run, monkeypatch, given, error, message):
    monkeypatch.chdir(run)
    with pytest.raises(error, match=message):
        bridge.CrossAttentionAAClip(**{"ckpt": "loop_2.pth"} | given)


def test_without_anomalib_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "bridges.anomalib")
    monkeypatch.setitem(sys.modules, "anomalib", None)
    with pytest.raises(ImportError, match=r"takes anomalib 2.7.0 or newer .* pip install -r requirements/anomalib.txt"):
        importlib.import_module("bridges.anomalib")
