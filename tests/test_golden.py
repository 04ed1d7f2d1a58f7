"""The base model equals the published AA-CLIP code: numbers it gave on stand-in weights, ViT-L/14 at 224 px.

Tolerances: tensors 1e-4 of their standard deviation, maps 1e-4 of their range, losses 1e-5, gradient norms 1e-3
relative.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.standin import fill_adapters, sample, standin_backbone, standin_images, standin_masks
from dataset.constants import describe_class
from forward_utils_cross_attention import (
    ClassText,
    PromptBank,
    anomaly_map,
    encode,
    frozen_patches,
    predict,
    stage1_loss,
    stage2_loss,
)
from model.adapter_cross_attention import CrossAttentionCLIP
from model.config import ModelConfig
from tests.conftest import encode_stage1

pytestmark = pytest.mark.vit_l

GOLDEN = json.loads((Path(__file__).parent / "golden" / "aaclip_vit_l14_224.json").read_text(encoding="utf-8"))


def assert_equal(tensor: torch.Tensor, golden: dict, tolerance: float | None = None) -> None:
    assert list(tensor.shape) == golden["shape"]
    tolerance = tolerance or 1e-4 * golden["std"]
    entries = torch.tensor(golden["entries"], dtype=torch.float64)
    found = sample(tensor, len(entries))
    assert found.shape == entries.shape
    assert (found - entries).abs().max().item() <= tolerance
    assert abs(tensor.double().mean().item() - golden["mean"]) <= tolerance
    assert abs(tensor.double().std(unbiased=False).item() - golden["std"]) <= tolerance


@pytest.fixture(scope="module")
def run():
    """Everything that the golden file names, computed once."""
    size, classes = GOLDEN["size"], GOLDEN["classes"]
    backbone = standin_backbone("ViT-L-14-336", size)
    model = CrossAttentionCLIP(backbone, ModelConfig("ViT-L-14-336", size, text_adapt_until=3, image_adapt_until=6))
    fill_adapters(model)
    images = standin_images(2, size)
    batch = {
        "mask": standin_masks(2, size),
        "label": torch.tensor(GOLDEN["label"]),
        "has_mask": torch.tensor([True, True]),
    }
    descriptions = {name: describe_class(GOLDEN["dataset"], name)[0] for name in classes}
    bank = PromptBank(backbone, descriptions, "industrial")
    out = SimpleNamespace(model=model, bank=bank, images=images, classes=classes)
    vv_start = backbone.default_vv_start
    out.surgery, out.plain = backbone.vv_tokens(images, vv_start)
    out.surgery_alone, _ = backbone.vv_tokens(images[:1], vv_start)
    out.stage1_patches = frozen_patches(backbone, out.surgery, out.plain)

    model.set_stage("text")
    text = ClassText(model, bank, fixed=False)
    first = encode_stage1(model, images, classes, text, "frozen", vv_start, vv_across_batch=True)
    out.anchors = first.anchors
    loss, out.stage1_terms = stage1_loss(first, backbone.scale, batch, "last", 0.1)
    loss.backward()
    out.stage1_grads = {name: p.grad.norm().item() for name, p in model.text_adapter.named_parameters()}

    model.set_stage("image")
    text = ClassText(model, bank, fixed=True)
    out.encoding = encode(model, images, classes, text)
    loss, out.stage2_terms = stage2_loss(out.encoding, backbone.scale, batch, 1)
    loss.backward()
    out.stage2_grads = {name: p.grad.norm().item() for name, p in model.image_adapter.named_parameters()}

    out.industrial = predict(model, images, classes, text)
    out.medical = anomaly_map(out.encoding.cosines, backbone.scale, size, "medical")
    return out


def level_losses(terms: dict) -> list[float]:
    return [sum(terms[f"{kind}_{k}"].item() for kind in ("focal", "dice_normal", "dice_abnormal")) for k in range(1, 5)]


@pytest.mark.parametrize("key", ["surgery_tokens", "surgery_tokens_alone"])
def test_vv_tokens(run, key):
    levels = {"surgery_tokens": run.surgery, "surgery_tokens_alone": run.surgery_alone}[key]
    for level, golden in zip(run.model.backbone.levels, GOLDEN[key], strict=True):
        assert_equal(levels[level], golden)


def test_plain_cls(run):
    cls = run.model.backbone.project_image(run.plain[24][:, 0])
    assert_equal(torch.nn.functional.normalize(cls, dim=-1), GOLDEN["cls"])


def test_stage1_patches(run):
    for patches, golden in zip(run.stage1_patches, GOLDEN["stage1_patches"], strict=True):
        assert_equal(patches, golden)


def test_plain_text(run):
    backbone = run.model.backbone
    ids = backbone.tokenize(["a photo of a candle.", "a damaged candle."])
    x = backbone.run_text_blocks(backbone.first_text_block(ids), start=1)
    ends = ids.argmax(dim=-1, keepdim=True)
    found = backbone.end_of_text(x, ends).squeeze(1) @ backbone.clip.text_projection
    assert_equal(found, GOLDEN["plain_text"])


def test_anchors(run):
    assert_equal(run.anchors, GOLDEN["anchors"])


def test_stage1_losses_and_gradients(run):
    assert level_losses(run.stage1_terms) == pytest.approx(GOLDEN["stage1_level_losses"], abs=1e-5)
    assert run.stage1_terms["orthogonal"].item() == pytest.approx(GOLDEN["stage1_orthogonal"], abs=1e-5)
    assert run.stage1_grads == pytest.approx(GOLDEN["stage1_grad_norms"], rel=1e-3)


def test_visual_features(run):
    for patches, golden in zip(run.encoding.patches, GOLDEN["seg_tokens"], strict=True):
        assert_equal(patches, golden)
    assert_equal(run.encoding.det, GOLDEN["det_token"])


def test_stage2_losses_and_gradients(run):
    assert run.stage2_terms["classification"].item() == pytest.approx(GOLDEN["stage2_cls_loss"], abs=1e-5)
    assert level_losses(run.stage2_terms) == pytest.approx(GOLDEN["stage2_level_losses"], abs=1e-5)
    assert run.stage2_grads == pytest.approx(GOLDEN["stage2_grad_norms"], rel=1e-3)


@pytest.mark.parametrize("domain", ["industrial", "medical"])
def test_maps(run, domain):
    maps = run.industrial.maps if domain == "industrial" else run.medical
    assert_equal(maps, GOLDEN[f"test_map_{domain}"], 1e-4 * (maps.max() - maps.min()).item())


def test_image_scores(run):
    golden = torch.tensor(GOLDEN["image_score"])
    assert (run.industrial.detection_scores - golden).abs().max() <= 1e-4 * golden.std(unbiased=False)
