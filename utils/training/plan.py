"""What a run will do: the stages that follow from its settings, and the plan in words."""

import math
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn

from model.adapter_cross_attention import STAGES, CrossAttentionCLIP
from model.backbone import Backbone, empty_backbone
from model.config import ModelConfig
from utils.settings import Settings

# The list of the classes that --val_classes holds out.
VAL_CLASSES_FILE = "val_classes.txt"


def stage_title(name: str) -> str:
    """A stage as messages call it."""
    return f"Stage {STAGES.index(name) + 1}"


class Stage(NamedTuple):
    """One stage of one loop. `features` are what Stage 1 looks at, see `see_stage1`; Stage 2 has none."""

    loop: int
    name: str
    epochs: int
    batch_size: int
    lr: float
    cross_attn_lr: float
    features: str | None

    @property
    def title(self) -> str:
        """As messages call it."""
        return stage_title(self.name)


class Position(NamedTuple):
    """What comes next: loops count from 1, finished epochs of the stage and finished steps of the epoch from 0."""

    loop: int
    stage: str
    epoch: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"loop {self.loop}, {stage_title(self.stage)}, epoch {self.epoch + 1}, step {self.step}"

    def order(self) -> tuple[int, int, int, int]:
        """Sorts positions by time."""
        return self.loop, STAGES.index(self.stage), self.epoch, self.step


@dataclass(frozen=True)
class Plan:
    """What a training is asked to do. `base` tells what it starts from; `files` are the names it will write."""

    config: ModelConfig
    settings: Settings
    stages: list[Stage]
    folder: Path
    files: list[str]
    base: dict = field(default_factory=dict)

    @property
    def header(self) -> dict:
        """What names the run, in its state and in the files it keeps."""
        return {"config": {"model": asdict(self.config), "training": asdict(self.settings)}, "base": self.base}

    @property
    def last_loop(self) -> int:
        """Number of the last loop."""
        return self.stages[-1].loop


def plan_stages(settings: Settings, loops: range) -> list[Stage]:
    """The stages of `loops`. The last of a list of epochs repeats; loop k has learning rates x lr_decay^(k-1)."""
    stages = []
    for loop in loops:
        decay = settings.lr_decay ** (loop - 1)
        for name in STAGES:
            epochs = getattr(settings, f"{name}_epoch")
            lr = getattr(settings, f"{name}_lr")
            cross_attn_lr = getattr(settings, f"{name}_cross_attn_lr")
            rates = [rate * decay for rate in (lr, lr if cross_attn_lr is None else cross_attn_lr)]
            if not all(map(math.isfinite, rates)):
                raise ValueError(f"--lr_decay {settings.lr_decay}: the learning rate of loop {loop} is not finite.")
            stages.append(
                Stage(
                    loop=loop,
                    name=name,
                    epochs=epochs[min(loop, len(epochs)) - 1],
                    batch_size=getattr(settings, f"{name}_batch_size"),
                    lr=rates[0],
                    cross_attn_lr=rates[1],
                    features=stage_features(settings, loop) if name == "text" else None,
                )
            )
    return stages


def stage_features(settings: Settings, loop: int) -> str:
    """What Stage 1 looks at: in loop 1, and with `--feedback off` in all, the frozen CLIP, as the base trains."""
    return "frozen" if loop == 1 or settings.feedback == "off" else settings.feedback


def shot_file(settings: Settings) -> str:
    """Name of the list of the images that --shot drew."""
    return f"{settings.shot}-shot.jsonl"


def vv_start(settings: Settings, backbone: Backbone) -> int:
    """The first block with V-V attention: --surgery_until_layer L means the last L - 1 blocks.

    Raises ValueError where the model has fewer.
    """
    until, depth = settings.surgery_until_layer, len(backbone.image_blocks)
    if until is None:
        return backbone.default_vv_start
    if not 1 <= until <= depth + 1:
        raise ValueError(f"--surgery_until_layer {until}: expected 1 to {depth + 1}; the model has {depth} blocks.")
    return depth - until + 1


def _count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _span(name: str, length: int) -> str:
    return f"{name}.0-{length - 1}" if length > 1 else f"{name}.0"


def trainable_parts(model: CrossAttentionCLIP) -> list[tuple[str, str, int, str]]:
    """(stage, part, parameters, what it does) of all that trains."""
    text, image, levels = model.text_adapter, model.image_adapter, model.backbone.levels
    adapters, seg_proj, det_proj = image["layer_adapters"], image["seg_proj"], image["det_proj"]
    text_count, image_count = model.config.text_adapt_until, model.config.image_adapt_until
    views = f"levels {', '.join(map(str, levels))} -> V1..V{len(levels)}"
    joint = model.config.cross_attn == "joint"
    gates = f"{len(levels)} gates, opened in loop 1 to"
    from_text = f"text -> image, {gates} {model.config.text_cross_attn_weight:g}"
    from_image = f"image -> text, {gates} {model.config.image_cross_attn_weight:g}"
    parts = [
        ("1", _span("text_adapter", text_count), text[:-1], f"{text_count} adapters, after the first text blocks"),
        ("1", f"text_adapter.{text_count}", text[-1], "1 projector of the prompts, in place of CLIP's"),
        ("1", "text_cross_attn", model.text_cross_attn, from_text if joint else "text -> image, after text block 0"),
        ("2", _span("layer_adapters", image_count), adapters, f"{image_count} adapters, after the first ViT blocks"),
        ("2", _span("seg_proj", len(levels)), seg_proj, f"{len(levels)} projectors, {views}"),
        ("2", "det_proj", det_proj, "1 projector of the detection feature, for the image score"),
        ("2", "image_cross_attn", model.image_cross_attn, from_image if joint else "image -> text, after ViT block 0"),
    ]
    return [(*part[:2], _count(part[2]), part[3] if part[2] is not None else "switched off") for part in parts]


def _paragraph(title: str, values: dict) -> str:
    """The values that are set, in lines of a readable width."""
    chosen = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    return textwrap.fill(f"{title}: {chosen}", 110, subsequent_indent="  ")


def describe_plan(plan: Plan) -> str:
    """A plan as text: what trains where, the stages in order, and the files it will write."""
    settings, config = plan.settings, plan.config
    model = CrossAttentionCLIP(empty_backbone(config.model_name, config.img_size), config)
    for name, module in model.cross_attentions().items():
        if getattr(settings, f"{name}_lr") is not None and not _count(module):
            raise ValueError(
                f"--{name}_lr: cross-attention in the joint space has no weights that learn, its gates are opened. "
                "Leave the flag out, or give --cross_attn block."
            )
    rows = trainable_parts(model)
    width = max(len(part) for _, part, _, _ in rows)
    lines = [_paragraph("Model", asdict(config)), _paragraph("Settings", asdict(settings)), "", "Trainable modules"]
    lines += [f"  Stage {stage}  {part:{width}}  {count:>12,}  {what}" for stage, part, count, what in rows]
    for number in ("1", "2"):
        lines.append(f"  Stage {number}  {'in all':{width}}  {sum(r[2] for r in rows if r[0] == number):>12,}")
    lines.append(f"  frozen   {'CLIP':{width}}  {_count(model.backbone):>12,}")
    lines += ["", f"Stages (V-V attention from block {vv_start(settings, model.backbone)} on)"]
    for stage in plan.stages:
        looks = "" if stage.features is None else f", features {stage.features.replace('frozen', 'frozen CLIP')}"
        cross = model.text_cross_attn if stage.name == "text" else model.image_cross_attn
        rate = f"lr {stage.lr:g}" + (f", cross-attention {stage.cross_attn_lr:g}" if _count(cross) else "")
        epochs = f"{stage.epochs} epoch{'s' * (stage.epochs > 1)}"
        lines.append(f"  loop {stage.loop}  {stage.title}  {epochs}, batch {stage.batch_size}, {rate}{looks}")
    files = plan.files if settings.shot is None else [*plan.files, shot_file(settings)]
    files = [*files, VAL_CLASSES_FILE] if settings.val_classes else files
    lines += ["", f"Files in {plan.folder}", *(f"  {name}" for name in files)]
    return "\n".join(lines)
