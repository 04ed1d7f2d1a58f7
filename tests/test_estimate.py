"""What a dry run says to expect, beside a formula and beside what was measured."""

import pytest
import torch

import train_cross_attention
from utils.training.estimate import GIB, Meter, Rehearsal, describe_estimates, estimates
from utils.training.plan import Plan


def plan_of(*words: str) -> Plan:
    """The plan of these words of the command line."""
    return train_cross_attention.make_plan(train_cross_attention.parse_arguments(["--dry_run", *words]), None)


def plain_flops(plan: Plan) -> tuple[int, float]:
    """FLOPs of a plain image forward, counted and by formula."""
    rehearsal = Rehearsal(plan.config, plan.settings)
    backbone, before = rehearsal.model.backbone, rehearsal.meter.flops
    with rehearsal.meter:
        images = torch.empty(2, 3, backbone.img_size, backbone.img_size)
    backbone.plain_tokens(images)
    tokens, width, pixels = backbone.grid**2 + 1, backbone.image_width, 3 * (backbone.img_size // backbone.grid) ** 2
    # Q, K, V and output take 8 T W^2, an MLP of four times the width 16 T W^2, both products of attention 4 T^2 W.
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    return rehearsal.meter.flops - before, 2 * (len(backbone.image_blocks) * block + 2 * (tokens - 1) * pixels * width)


@pytest.mark.parametrize("model", ["demo", "ViT-L-14-336"])
def test_operations_are_those_of_the_formula(model):
    counted, by_formula = plain_flops(plan_of("--model_name", model))
    assert counted == by_formula
    if model != "demo":
        assert counted / 2 == pytest.approx(1.01e12, rel=0.01)


def test_stages_cost_what_their_passes_cost():
    plan = plan_of()
    unit = plain_flops(plan)[0] / 2
    rows = {row.title: row for row in estimates(plan)}
    units = {title: row.image_flops / unit for title, row in rows.items()}
    # See docs/performance.md: what was measured in units of a plain forward.
    assert 1 < units["evaluation"] < 1.15
    assert 2.1 < units["Stage 2"] < 2.5
    assert 2.4 < units["Stage 1, frozen CLIP"] < 2.9
    assert 1 < units["Stage 1, adapted"] < 1.3
    assert all(row.cost.peak >= row.cost.weights + row.cost.kept for row in rows.values())
    stage2 = rows["Stage 2"]
    assert stage2.largest_batch(80) > stage2.largest_batch(24) > stage2.largest_batch(8) > stage2.largest_batch(1) == 0


def test_what_saves_memory_or_time_is_expected_to():
    plan = plan_of("--model_name", "demo")
    first, second = plan.stages[:2]
    whole = Rehearsal(plan.config, plan.settings)
    stage1, stage2 = whole.cost(first, 8), whole.cost(second, 8)
    pieces = Rehearsal(plan.config, plan.settings, pieces=4).cost(second, 8)
    assert pieces.flops == pytest.approx(stage2.flops, rel=0.01)
    assert pieces.kept == pytest.approx(stage2.kept / 4, rel=0.1)
    recomputed = Rehearsal(plan.config, plan.settings, recompute=True).cost(second, 8)
    assert recomputed.kept < stage2.kept / 2 and recomputed.flops > 1.2 * stage2.flops
    kept = plan_of("--model_name", "demo", "--cache_features")
    assert Rehearsal(kept.config, kept.settings).cost(first, 8).flops < stage1.flops / 2


# GiB that Stage 2 took on an H100 (docs/performance.md).
@pytest.mark.parametrize(("precision", "batch", "gib"), [("fp32", 2, 4.8), ("fp32", 16, 25.0), ("bf16", 16, 17.2)])
def test_memory_is_what_a_gpu_took(precision, batch, gib):
    plan = plan_of("--precision", precision)
    stage = next(stage for stage in plan.stages if stage.name == "image")
    cost = Rehearsal(plan.config, plan.settings).cost(stage, batch)
    assert cost.peak / GIB == pytest.approx(gib, rel=0.1)


def test_memory_of_what_is_gone_is_free_again():
    meter = Meter()
    with meter:
        first = torch.empty(1000)
    second = (first + 1).view(10, 100)
    assert (meter.live, meter.peak) == (8000, 8000)
    del second
    assert (meter.live, meter.peak) == (4000, 8000)


def test_an_outlook_names_the_speed_it_is_for():
    plan = plan_of("--model_name", "demo", "--feedback", "off", "--cache_features")
    text = describe_estimates(plan)
    assert "at 40 TFLOP/s, as an H100 reached in fp32" in text and text.count("Stage 1") == 1
    assert "Stage 1, frozen CLIP, kept" in text and "kept: once a loop all images are looked at first" in text
    assert "at 0.5 TFLOP/s\n" in describe_estimates(plan, 0.5)
    text = describe_estimates(plan, pieces=2, recompute=True)
    assert "with --grad_checkpointing and --accumulate 2 (Stage 2)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--img_size", "16"], "grid of 2 x 2 patches is too small"), (["--device_tflops", "-1"], "a number over 0")],
)
def test_what_cannot_be_estimated_is_said(scripts, capsys, words, message):
    assert scripts("train", "--dry_run", "--model_name", "demo", *words) == 2
    assert message in capsys.readouterr().err
