"""What is said of judged images."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.standin import standin_images
from dataset.loading import AnomalyDataset, make_loader
from dataset.sets import open_dataset
from dataset.transforms import Transform
from forward_utils_cross_attention import Prediction, PromptBank
from model.config import REPOSITORY
from tests.conftest import make_model
from utils import judging
from utils.calibration import Calibration
from utils.checkpoints import load_checkpoint
from utils.judging import Detector, judge_batches
from utils.models import ModelLoader
from utils.report.plots import PANEL_INCHES
from utils.verdicts import calibrated_extremes, caption, scaled


@pytest.fixture(scope="module")
def detector(backbone) -> Detector:
    bank = PromptBank(backbone, {"nut": "nut", "bolt": "bolt"}, "industrial")
    return Detector.of(make_model(backbone), bank, name="x")


def test_a_map_that_is_not_finite_names_its_image(detector, monkeypatch):
    maps = torch.zeros(2, 3, 3)
    maps[1, 0, 0] = math.nan
    broken = Prediction(maps, torch.zeros(2), torch.zeros(2))
    monkeypatch.setattr(judging, "predict", lambda *arguments: broken)
    with pytest.raises(ValueError, match=r"b\.png: the model's map or score is not finite"):
        detector.predict(standin_images(2, 64), ["nut", "bolt"], ["a.png", "b.png"])


def test_a_single_image_needs_a_detector_of_one_class(detector, data_root):
    with pytest.raises(ValueError, match="this one knows nut, bolt"):
        detector(data_root / "small" / "candle" / "0_0.png")


def test_pictures_of_single_images_share_a_scale(detector, backbone):
    fitted = Calibration(1.0, 1.0, 0.0, 0.5, (-2.0, 6.0), 10, True)
    calibrated = Detector.of(detector.model, detector.text.bank, fitted)
    ends, words = calibrated_extremes([calibrated], (0.0, 1.0), "these maps")
    assert ends == [(-2.0, 6.0)] and words == "a model's extremes on images of training"
    ends, words = calibrated_extremes([calibrated, detector], (0.0, 1.0), "these maps")
    assert ends == [(0.0, 1.0)] * 2 and words == "the extremes of these maps"
    assert scaled(torch.tensor([-2.0, 2.0]).numpy(), (-2.0, 6.0)).tolist() == [0.0, 0.5]


def test_bf16_gives_the_metrics_of_fp32(data_root):
    loader = ModelLoader(torch.device("cpu"))
    model, data = loader(load_checkpoint(REPOSITORY / "ckpt" / "demo" / "base")), open_dataset("small", data_root)
    backbone = loader.backbone
    bank = PromptBank(backbone, data.descriptions, data.domain)
    detectors = [Detector.of(model, bank, precision=precision) for precision in ("fp32", "bf16")]
    batches = make_loader(AnomalyDataset(data.folder, data.records, Transform(backbone.img_size)), 10, 0)
    judged = list(judge_batches(detectors, batches))
    truth = torch.cat([batch["mask"] for batch, _ in judged]).flatten()
    maps, scores = (
        [torch.cat([getattr(found[number], name) for _, found in judged]).flatten() for number in (0, 1)]
        for name in ("maps", "detection_scores")
    )
    assert not torch.equal(*maps)
    for metric in (roc_auc_score, average_precision_score):
        full, half = (metric(truth, values) for values in maps)
        assert abs(full - half) <= 1e-3
    # Of so few images a metric moves by more as soon as two of them change places.
    assert (scores[0] - scores[1]).abs().max() <= 1e-3


def test_a_caption_fits_beneath_its_panel():
    lines = [line for kind in ("published", "single-image") for line in caption(kind, 0.5, 0.97, True).splitlines()]
    assert lines == ["published score 0.500", "p 0.97: anomalous", "single-image score 0.500", "p 0.97: anomalous"]
    # A letter of 6 points is about 0.6 of that wide.
    assert max(map(len, lines)) * 0.6 * 6 / 72 < PANEL_INCHES
    assert caption("published", 0.5, None, None) == "published score 0.500"
