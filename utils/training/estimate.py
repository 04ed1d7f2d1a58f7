"""What to expect of a training before it runs: operations, peak memory and images per second, stage by stage.

The program's own forward, backward and optimiser step run on tensors that have sizes, but no values (PyTorch's
`FakeTensorMode`). So nothing here repeats what the model does, and a change of the model changes the estimate.
"""

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from forward_utils_cross_attention import (
    ClassText,
    PromptBank,
    Sight,
    autocast,
    encode,
    encode_sight,
    predict,
    see_stage1,
    stage1_loss,
    stage2_loss,
)
from model.adapter_cross_attention import CrossAttentionCLIP
from model.backbone import Backbone, empty_backbone
from model.config import ModelConfig
from utils.settings import Settings
from utils.testing.bench import EVAL_BATCH
from utils.training.optimizer import make_optimizer
from utils.training.plan import Plan, Stage, vv_start

GIB = 2**30
# TFLOP/s of training and evaluation on an H100, batch 16 (docs/performance.md).
MEASURED_TFLOPS = {"fp32": 40.0, "bf16": 250.0}
# Memory of GPUs in GiB, and what of it is left to CUDA itself and to gaps between tensors.
CARDS, RESERVED = (8, 24, 80), 1.0
# Stage 1 computes the prompts of each class of a batch: as many as VisA has, with names of a usual length.
CLASSES, DESCRIPTION = 12, "cashew nut"


class Cost(NamedTuple):
    """Of one step: FLOPs (a multiply-add is two), and bytes: of the model, kept for the backward pass, at the peak."""

    flops: int
    weights: int
    kept: int
    peak: int


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# {operation: formula of its FLOPs}: PyTorch's, and fused attention as the CPU has it, which these leave out.
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Meter(FakeTensorMode):
    """Tensors without values, and what would be computed and kept if they had some.

    `flops` since it was made; `live` bytes of all tensors that are alive, and their `peak`.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # indices and the like have values
        self.flops = self.live = self.peak = 0
        self._known: set[int] = set()
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:  # an operation that another one is made of
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._inside = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = False
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:  # a view has the storage of what it looks at
            self._known.add(address)
            weakref.finalize(storage, self._remove, address, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _remove(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.live -= size


class _Bank(PromptBank):
    """Prompts of a model without values, in which no word can be looked up."""

    def check_words(self, backbone: Backbone) -> None:
        pass


class Rehearsal:
    """Training steps and evaluation of a model of `config` that has no values, as `settings` have them.

    `recompute` as in `Backbone`, `pieces` as in `Trainer`. Raises ValueError where the model is too small for these.
    """

    def __init__(self, config: ModelConfig, settings: Settings, recompute: bool = False, pieces: int = 1):
        self.settings, self.pieces, self.meter = settings, pieces, Meter()
        with self.meter:
            backbone = empty_backbone(config.model_name, config.img_size, config.quick_gelu, "cpu")
            self.model = CrossAttentionCLIP(backbone, config)
        backbone.recompute = recompute
        self.weights = self.meter.live
        self.vv_start = vv_start(settings, backbone)

    def cost(self, stage: Stage | None, batch_size: int) -> Cost:
        """Of one step of a stage, or of one evaluation (None), on `batch_size` images."""
        model, meter = self.model, self.meter
        model.set_stage(stage.name if stage else None)
        fixed = stage is None or stage.name == "image"  # then a class more costs a step nothing
        classes = [str(number % (1 if fixed else CLASSES)) for number in range(batch_size)]
        bank = _Bank(model.backbone, dict.fromkeys(classes, DESCRIPTION), self.settings.domain or "industrial")
        text = ClassText(model, bank, fixed)
        self._compute_fixed(text, classes)
        optimizer = self._optimizer(stage) if stage else None
        pieces = min(self.pieces, batch_size) if stage and stage.name == "image" else 1
        batch = self._batch(math.ceil(batch_size / pieces))
        classes = classes[: len(batch["image"])]
        sight = self._see(stage, batch, classes, text) if stage and self._keeps(stage) else None
        before, flops, meter.peak, kept = meter.live, meter.flops, meter.live, 0
        for _ in range(min(pieces, 2)):  # from the second on, all are as the second
            result = self._forward(stage, batch, classes, text, sight)
            kept = max(kept, meter.live - before)
            if optimizer:
                result.backward()
            del result
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        done = len(batch["image"]) * min(pieces, 2)
        return Cost((meter.flops - flops) * batch_size // done, self.weights, kept, meter.peak)

    def _keeps(self, stage: Stage) -> bool:
        return self.settings.cache_features and stage.features is not None

    def _batch(self, size: int) -> dict[str, Tensor]:
        side = self.model.backbone.img_size
        with self.meter:
            batch = {"image": torch.empty(size, 3, side, side), "mask": torch.empty(size, 1, side, side)}
            batch["label"] = torch.empty(size, dtype=torch.long)
        return batch | {"has_mask": torch.ones(size, dtype=torch.bool)}  # values that are read

    def _compute_fixed(self, text: ClassText, classes: list[str]) -> None:
        """What is computed once for all steps."""
        with autocast(self.model.backbone.device, self.settings.precision):
            text.contexts(classes)
            if text.fixed and not self.model.prompts_see_image:
                text.anchors(classes, None)

    def _optimizer(self, stage: Stage) -> torch.optim.Adam:
        """With the moments that it has from the second step on."""
        optimizer = make_optimizer(self.model.learned(stage.name), stage)
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def _see(self, stage: Stage, batch: dict[str, Tensor], classes: list[str], text: ClassText) -> Sight:
        """What Stage 1 sees."""
        settings, images = self.settings, batch["image"]
        other = images if self.model.sees_another_image else None
        how = str(stage.features), self.vv_start, settings.vv_attention == "batch", settings.precision
        return see_stage1(self.model, images, classes, text, *how, other)

    def _forward(
        self,
        stage: Stage | None,
        batch: dict[str, Tensor],
        classes: list[str],
        text: ClassText,
        sight: Sight | None,
    ) -> Any:
        """The loss of a stage, the prediction of evaluation."""
        model, settings, images = self.model, self.settings, batch["image"]
        precision, scale = settings.precision, model.backbone.scale
        other = images if model.sees_another_image else None
        if stage is None:
            return predict(model, images, classes, text, precision, other=other)
        if stage.features is None:
            encoding = encode(model, images, classes, text, precision, other=other)
            return stage2_loss(encoding, scale, batch, settings.det_temperature)[0]
        encoding = encode_sight(model, sight or self._see(stage, batch, classes, text), classes, text, precision)
        return stage1_loss(encoding, scale, batch, settings.stage1_levels, settings.text_norm_weight)[0]


class Estimate(NamedTuple):
    """Of one kind of step: its cost with `batch_size` images, and bytes at the peak, `fixed` + `per_image` x images."""

    title: str
    batch_size: int
    cost: Cost
    fixed: float
    per_image: float

    @property
    def image_flops(self) -> float:
        """FLOPs per image."""
        return self.cost.flops / self.batch_size

    def largest_batch(self, card: float) -> int:
        """The most images whose step fits in a GPU of so many GiB; 0 where none does."""
        return max(0, int(((card - RESERVED) * GIB - self.fixed) / self.per_image))


def estimates(plan: Plan, recompute: bool = False, pieces: int = 1) -> list[Estimate]:
    """Of each kind of stage that the plan has, and of evaluation; the rest as in `Rehearsal`."""
    rehearsal, found = Rehearsal(plan.config, plan.settings, recompute, pieces), []
    kinds: dict[str, Stage | None] = {}
    for stage in plan.stages:
        looks = f", {stage.features.replace('frozen', 'frozen CLIP')}" if stage.features else ""
        looks += ", kept" if stage.features and plan.settings.cache_features else ""
        kinds.setdefault(f"{stage.title}{looks}", stage)
    for title, kind in {**kinds, "evaluation": None}.items():
        size = kind.batch_size if kind else EVAL_BATCH
        cost, double = (rehearsal.cost(kind, images) for images in (size, 2 * size))
        per_image = (double.peak - cost.peak) / size
        found.append(Estimate(title, size, cost, cost.peak - per_image * size, per_image))
    return found


def _short(number: float) -> str:
    return f"{number:6,.0f}" if number >= 100 else f"{number:6.3g}"


def describe_estimates(plan: Plan, tflops: float | None = None, recompute: bool = False, pieces: int = 1) -> str:
    """What to expect of a plan, as text; `tflops` is what the device reaches, without it what an H100 did.

    The rest as in `Rehearsal`.
    """
    config, precision = plan.config, plan.settings.precision
    rows, speed = estimates(plan, recompute, pieces), tflops or MEASURED_TFLOPS[precision]
    width = max(len(row.title) for row in rows)
    lines = [
        f"What to expect ({config.model_name}, {config.img_size} px, {precision}; computed, not measured)",
        f"  {'':{width}}         GFLOP/  GFLOP/  images  activations  peak  largest batch in GiB",
        f"  {'':{width}}  batch    step   image      /s          GiB   GiB" + "".join(f"  {card:6}" for card in CARDS),
    ]
    for row in rows:
        cost, rate = row.cost, speed * 1e12 / row.image_flops
        lines.append(
            f"  {row.title:{width}}  {row.batch_size:5}  {_short(cost.flops / 1e9)}  {_short(row.image_flops / 1e9)}  "
            f"{_short(rate)}  {cost.kept / GIB:11.2f}  {cost.peak / GIB:4.1f}"
            + "".join(f"  {row.largest_batch(card):6,}" for card in CARDS)
        )
    named = "" if tflops else f", as an H100 reached in {precision} (--device_tflops: another speed)"
    notes = [
        f"  images/s: at {speed:g} TFLOP/s{named}",
        f"  activations: what the backward pass needs, beside the weights ({rows[0].cost.weights / GIB:.2f} GiB)",
        f"  largest batch: that fits in a GPU of so many GiB, {RESERVED:g} GiB of it left to CUDA",
    ]
    if plan.settings.cache_features:
        notes.append(
            "  kept: once a loop all images are looked at first, for what a step costs without --cache_features"
        )
    if recompute or pieces > 1:
        flags = ["--grad_checkpointing"] * recompute + [f"--accumulate {pieces} (Stage 2)"] * (pieces > 1)
        notes.append(f"  with {' and '.join(flags)}")
    return "\n".join([*lines, *notes])
