"""Stand-in weights and inputs that the golden numbers were computed on: each tensor depends on its name alone."""

import zlib

import open_clip
import torch
from torch import Tensor

from model.backbone import Backbone, clip_config


def named_normal(name: str, shape: tuple[int, ...], std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Normal float32 values from a generator seeded by the CRC-32 of `name`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return mean + std * torch.randn(tuple(shape), generator=generator)


def _spread(name: str, tensor: Tensor) -> tuple[float, float]:
    """Standard deviation and mean of a weight's stand-in values."""
    if "ln_" in name and name.endswith("weight"):
        return 0.05, 1.0
    if tensor.ndim == 1:
        return 0.02, 0.0
    if "embedding" in name:
        return 0.05, 0.0
    fan_in = tensor.shape[0] if tensor.ndim == 2 and name.endswith("proj") else tensor[0].numel()
    return fan_in**-0.5, 0.0


def standin_weights(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Stand-in values for a state dict; `prefix` goes before each name."""
    filled = {}
    for name, tensor in state.items():
        if name == "logit_scale":
            filled[name] = torch.tensor(4.6052)
        else:
            std, mean = _spread(prefix + name, tensor)
            filled[name] = named_normal(prefix + name, tensor.shape, std, mean)
    return filled


def standin_backbone(model_name: str, img_size: int) -> Backbone:
    """A backbone on stand-in weights."""
    clip = open_clip.CLIP(**clip_config(model_name, img_size))
    clip.load_state_dict(standin_weights(clip.state_dict()))
    return Backbone(clip, model_name)


def fill_adapters(model: torch.nn.Module) -> None:
    """Stand-in values for both adapters of `model`."""
    for name in ("text_adapter", "image_adapter"):
        module = getattr(model, name)
        module.load_state_dict(standin_weights(module.state_dict(), f"{name}."))


def standin_images(batch: int, size: int) -> Tensor:
    """Normalised pixels [batch, 3, size, size]."""
    return named_normal(f"image{batch}x{size}", (batch, 3, size, size))


def standin_masks(batch: int, size: int) -> Tensor:
    """Masks [batch, 1, size, size]: a rectangle in the first, none in the others."""
    masks = torch.zeros(batch, 1, size, size)
    masks[0, :, size // 4 : size // 2, size // 3 : size // 2] = 1
    return masks


def sample(tensor: Tensor, count: int) -> Tensor:
    """`count` evenly spaced entries of the flattened tensor (all of them where it has fewer), in float64."""
    flat = tensor.detach().double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, min(count, len(flat))).round().long()]


class Scripted(torch.nn.Module):
    """A state dict as a module that TorchScript saves, as OpenAI's weights are."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            parent = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.register_buffer(last, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
