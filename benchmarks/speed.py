"""Seconds and peak memory of training steps and evaluation, in units of one plain image forward of the backbone.

    python -m benchmarks.speed                       # ViT-L/14 on stand-in weights, 224 px, batch 2

Medians of one run. Peak memory is that of the whole process (or of the GPU) during the call.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.standin import standin_backbone, standin_images, standin_masks
from forward_utils_cross_attention import (
    ClassText,
    PromptBank,
    autocast,
    encode,
    encode_sight,
    predict,
    see_stage1,
    stage1_loss,
    stage2_loss,
)
from model.adapter_cross_attention import CrossAttention, CrossAttentionCLIP, Gated
from model.backbone import Backbone, clip_config, default_adapters
from model.config import PLACEMENTS, ModelConfig, new_extension
from utils.arguments import DEFAULT_PRECISION, PRECISION

PROCESS_STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make_model(backbone: Backbone, placement: str, text: bool, image: bool) -> CrossAttentionCLIP:
    """A model with fresh modules, the cross-attentions moved off their zero start."""
    values: dict[str, Any] = dict(default_adapters(clip_config(backbone.model_name, backbone.img_size)))
    values |= {**new_extension(placement), "text_cross_attn": text, "image_cross_attn": image}
    config = ModelConfig(backbone.model_name, backbone.img_size, **values)
    torch.manual_seed(0)
    model = CrossAttentionCLIP(backbone, config)
    for module in (model.text_cross_attn, model.image_cross_attn):
        if isinstance(module, Gated):
            module.open(1)
        elif isinstance(module, CrossAttention):
            torch.nn.init.normal_(module.out_proj.weight, std=0.01)
    return model


class Calls:
    """What is measured: each method gives one call, on the same images of two classes, the first with a defect."""

    def __init__(self, backbone: Backbone, batch_size: int, precision: str = "fp32"):
        size, device = backbone.img_size, backbone.device
        self.backbone, self.precision = backbone, precision
        self.images = standin_images(batch_size, size).to(device)
        self.classes = ["candle", "cashew"] * (batch_size // 2) + ["candle"] * (batch_size % 2)
        self.batch = {
            "mask": standin_masks(batch_size, size).to(device),
            "label": torch.tensor([1] + [0] * (batch_size - 1), device=device),
            "has_mask": torch.ones(batch_size, dtype=torch.bool),
        }
        self.bank = PromptBank(backbone, {"candle": "candle", "cashew": "cashew nut"}, "industrial")

    def plain(self) -> None:
        """The unit: open_clip's own forward."""
        with torch.no_grad(), autocast(self.backbone.device, self.precision):
            self.backbone.clip.encode_image(self.images)

    def step(
        self, model: CrossAttentionCLIP, stage: str, looks_at: str = "", levels: str = "all", kept: bool = False
    ) -> Callable[[], None]:
        """A training step of "text", which looks at features and trains on `levels`, or of "image".

        `kept`: the features were seen before the call, and come in half precision.
        """
        # As in training, one for all steps of a stage.
        model.set_stage(stage)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        text = ClassText(model, self.bank, fixed=stage == "image")
        images, classes, batch, precision = self.images, self.classes, self.batch, self.precision
        scale = self.backbone.scale
        how = images, classes, text, looks_at, self.backbone.default_vv_start, True, precision
        sight = see_stage1(model, *how) if kept else None
        if sight is not None:
            sight = sight._replace(patches=[level.half() for level in sight.patches])

        def run() -> None:
            model.set_stage(stage)
            optimizer.zero_grad(set_to_none=True)
            if looks_at:
                encoding = encode_sight(model, sight or see_stage1(model, *how), classes, text, precision)
                loss, _ = stage1_loss(encoding, scale, batch, levels, 0.1)
            else:
                loss, _ = stage2_loss(encode(model, images, classes, text, precision), scale, batch, 1)
            loss.backward()
            optimizer.step()

        return run

    def evaluation(self, model: CrossAttentionCLIP) -> Callable[[], None]:
        """Maps and scores."""
        text = ClassText(model, self.bank, fixed=True)

        def run() -> None:
            model.set_stage(None)
            predict(model, self.images, self.classes, text, self.precision)

        return run


def cases(
    backbone: Backbone, batch_size: int, placement: str, precision: str = "fp32"
) -> dict[str, Callable[[], None]]:
    """{what: one call of it}."""
    calls = Calls(backbone, batch_size, precision)
    both, image_only = (make_model(backbone, placement, text, True).to(backbone.device) for text in (True, False))
    return {
        "plain image forward (the unit)": calls.plain,
        "evaluation, image cross-attention": calls.evaluation(image_only),
        "evaluation, both cross-attentions": calls.evaluation(both),
        "Stage 1 step, loop 1": calls.step(both, "text", "frozen"),
        "Stage 1 step, later loops": calls.step(both, "text", "adapted"),
        "Stage 1 step, kept features": calls.step(both, "text", "frozen", kept=True),
        "Stage 2 step": calls.step(both, "image"),
    }


def measure(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds and peak memory in GiB of one call."""
    reset_peak_memory(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, peak_memory(device)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS_STATUS.exists():
        PEAK_RESET.write_text("5")


def peak_memory(device: torch.device) -> float:
    """Peak in GiB since the last reset: of the GPU, else of the process (on Linux; elsewhere NaN)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if not PROCESS_STATUS.exists():
        return float("nan")
    (line,) = (line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20  # it is given in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="ViT-L-14-336")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--cross_attn", default="joint", choices=tuple(PLACEMENTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISION["choices"], default=DEFAULT_PRECISION)
    args = parser.parse_args()
    device = torch.device(args.device)
    backbone = standin_backbone(args.model_name, args.img_size).to(device)
    runs = cases(backbone, args.batch_size, args.cross_attn, args.precision)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    # Round after round, so that a machine that slows down does so for all.
    for _ in tqdm(range(args.repeats + 1), desc="rounds", disable=None):
        for name, run in runs.items():
            found[name].append(measure(run, device))
    # The first round warms up.
    rows = {
        name: [statistics.median(column) for column in zip(*values[1:], strict=True)] for name, values in found.items()
    }
    unit = next(iter(rows.values()))[0]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    what = f"{args.model_name}, {args.img_size} px, batch {args.batch_size}, {args.precision}"
    print(f"{what}, {where}, {args.repeats} rounds")
    for name, (seconds, memory) in rows.items():
        print(f"  {name:36} {seconds:8.3f} s  {seconds / unit:6.2f} units  peak {memory:5.2f} GiB")


if __name__ == "__main__":
    main()
