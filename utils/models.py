"""From a checkpoint to a model: its configuration, the backbone it stands on, its weights."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.adapter_cross_attention import CrossAttentionCLIP
from model.backbone import Backbone, clip_config, default_adapters, load_backbone
from model.config import DEFAULT_MODEL, ModelConfig, model_fields
from model.weights import check_state
from utils.checkpoints import Checkpoint, adapter_kind
from utils.machine import check_compiler
from utils.options import completed
from utils.schema import ModelRecord, expect

logger = logging.getLogger(__name__)


def resolve_config(
    flags: Mapping[str, Any], checkpoint: Checkpoint | None = None, defaults: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model's configuration: of the checkpoint (record or keys), else `flags`, `defaults`, AA-CLIP's values.

    `flags` and `defaults` are {field of ModelConfig: value}. A base leaves the extension to them, a loop file does not.
    What is assumed of a base that names nothing (AA-CLIP's own files) is said. Raises ValueError for a flag that
    contradicts the checkpoint.
    """
    known = {} if checkpoint is None else known_of(checkpoint)
    for name, value in flags.items():
        if checkpoint is not None and name in known and known[name] != value:
            raise ValueError(
                f"--{name} {value}: contradicts {checkpoint.path}, which has {known[name]}. Leave the flag out."
            )
    chosen = {"model_name": DEFAULT_MODEL, **(defaults or {}), **flags, **known}
    clip = clip_config(chosen["model_name"], chosen.get("img_size"), chosen.get("quick_gelu", False))
    config = ModelConfig(**{**default_adapters(clip), **chosen, "img_size": clip["vision_cfg"]["image_size"]})
    silent = ("model_name", "img_size", "quick_gelu", "text_adapt_weight", "image_adapt_weight")
    assumed = [f"--{name} {getattr(config, name)}" for name in silent if name not in known]
    if checkpoint is not None:
        expect(ModelRecord, asdict(config), checkpoint.path)
    if checkpoint is not None and assumed:
        logger.info("%s names no backbone. Assumed: %s", checkpoint.path, " ".join(assumed))
    return config


def known_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """{field of ModelConfig: value} that a checkpoint tells of its model. Raises ValueError for unknown adapters."""
    kind, recorded = adapter_kind(checkpoint), checkpoint.model
    if recorded is None:
        return kind
    for name, found in kind.items():
        if recorded[name] != found:
            raise ValueError(f"{checkpoint.path}: config says {name} {recorded[name]}, its tensors have {found}.")
    if checkpoint.is_loop_file:
        return completed(ModelConfig, recorded)
    return {field.name: recorded[field.name] for field in model_fields(extension=False) if field.name in recorded}


def build_model(
    config: ModelConfig, backbone: Backbone, checkpoint: Checkpoint | None, device: torch.device, seed: int = 0
) -> CrossAttentionCLIP:
    """The model of `config` on `device`; what the checkpoint does not hold starts from `seed`.

    PyTorch's own generator stays as it is.
    """
    if checkpoint is not None:
        check_clip(checkpoint.clip_sha256, backbone, f"{checkpoint.path}: trained on other CLIP weights, SHA-256")
        with torch.device("meta"):  # before memory is taken for what a file merely claims
            check_modules(CrossAttentionCLIP(backbone, config), checkpoint.modules, checkpoint.path)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = CrossAttentionCLIP(backbone, config)
    for name, state in checkpoint.modules.items() if checkpoint is not None else ():
        if state is not None:  # a module that the checkpoint lacks stays as it is
            getattr(model, name).load_state_dict(state)
    return model.to(device)


def check_modules(model: CrossAttentionCLIP, modules: Mapping[str, dict[str, Tensor] | None], path: Path) -> None:
    """Raise ValueError for the first key of a file's modules that is missing, unknown or of another shape."""
    for name, state in modules.items():
        module: nn.Module | None = getattr(model, name)
        if state is None:
            continue
        if module is None:
            raise ValueError(f"{path}: holds '{name}', which is switched off.")
        check_state(module.state_dict(), state, f"{path}: '{name}'")


def check_clip(recorded: str | None, backbone: Backbone, what: str) -> None:
    """Raise ValueError, beginning with `what`, where CLIP weights are not the recorded ones (None: not known)."""
    if recorded is not None and recorded != backbone.sha256:
        found = "unknown ones" if backbone.sha256 is None else f"{backbone.sha256[:16]}..."
        raise ValueError(
            f"{what} {recorded[:16]}..., found {found} for {backbone.model_name}. "
            "Give the right file with --clip_weights FILE."
        )


def compile_models(models: Iterable[CrossAttentionCLIP]) -> None:
    """Have their visual forwards compiled, at the next call. Raises ValueError where PyTorch cannot compile here."""
    # Within DistributedDataParallel it would cut the graph where gradients are sent.
    torch._dynamo.config.optimize_ddp = False
    for model in models:
        check_compiler(model.backbone.device)
        model.compile()


class ModelLoader:
    """Makes the models of checkpoints, all on one backbone: the given one, else that of the first checkpoint.

    `flags` {field of ModelConfig: value} stand in for what a checkpoint leaves open.
    """

    def __init__(
        self,
        device: torch.device,
        clip_weights: Path | None = None,
        flags: Mapping[str, Any] | None = None,
        backbone: Backbone | None = None,
    ):
        self.device, self.clip_weights, self.flags = device, clip_weights, dict(flags or {})
        self._backbone = backbone

    @property
    def backbone(self) -> Backbone:
        """The backbone of all models. Raises RuntimeError where none was loaded yet."""
        if self._backbone is None:
            raise RuntimeError("No backbone yet: it comes with the first checkpoint.")
        return self._backbone

    def __call__(self, checkpoint: Checkpoint) -> CrossAttentionCLIP:
        """The model of a checkpoint. Raises ValueError where its backbone is not that of the others."""
        config = resolve_config(self.flags, checkpoint)
        own = (config.model_name, config.img_size, config.quick_gelu)
        if self._backbone is None:
            self._backbone = load_backbone(*own, self.clip_weights)
        shared = (self.backbone.model_name, self.backbone.img_size, self.backbone.quick_gelu)
        if own != shared:
            raise ValueError(
                f"{checkpoint.path}: its backbone (name, size in px, quick-GELU) is {own}, "
                f"that of the others {shared}. Test them in two calls."
            )
        model = build_model(config, self.backbone, checkpoint, self.device)
        model.set_stage(None)
        return model
