"""What is measured of a training step: gradients, updates, and what the cross-attentions add."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from model.adapter_cross_attention import CrossAttentionCLIP


@contextmanager
def added_terms(model: CrossAttentionCLIP) -> Iterator[dict[str, Tensor]]:
    """{"added_<module>": norm of a cross-attention's added term / norm of its input}, filled as the model runs."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].detach()
        found[f"added_{name}"] = (output.detach() - x).float().norm() / x.float().norm()

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.cross_attentions().items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def gradient_norms(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """{"grad_norm_<module>": norm of all its gradients}."""
    return {
        f"grad_norm_{name}": nn.utils.get_total_norm(
            [tensor.grad for tensor in module.parameters() if tensor.grad is not None]
        )
        for name, module in modules.items()
    }


@contextmanager
def update_norms(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """{"update_<module>": how far its weights move within this context, as a norm}, filled at its end."""
    found: dict[str, Tensor] = {}
    before = {name: [tensor.detach().clone() for tensor in module.parameters()] for name, module in modules.items()}
    yield found
    for name, module in modules.items():
        moved = [new.detach() - old for new, old in zip(module.parameters(), before[name], strict=True)]
        found[f"update_{name}"] = nn.utils.get_total_norm(moved)


def to_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Python floats, brought from the device in one go."""
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


class Means:
    """Means of named values over the steps of an epoch, in Python floats, so that they can be saved and go on."""

    def __init__(self, totals: dict[str, list] | None = None):
        self.totals = totals or {}

    def add(self, values: Mapping[str, float]) -> None:
        """Take in the values of a step."""
        for name, value in values.items():
            total = self.totals.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def get(self) -> dict[str, float]:
        """The mean of each value over the steps that had it."""
        return {name: total / count for name, (total, count) in self.totals.items()}

    def total(self, name: str) -> float:
        """The sum of a value over the steps."""
        return self.totals[name][0]
