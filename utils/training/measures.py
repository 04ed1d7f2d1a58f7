"""What is measured of a training step: gradients, updates, and what the cross-attentions add."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from model.adapter_cross_attention import CrossAttentionCLIP

# Endings of what `added_terms` sums: squares of what is added, and of what it is added to.
OUTPUT, INPUT = "_output", "_input"


@contextmanager
def added_terms(model: CrossAttentionCLIP) -> Iterator[dict[str, Tensor]]:
    """Sums of squares of each cross-attention's added term and of its input, filled as the model runs.

    "added_<module>_output" and "added_<module>_input"; `with_added_shares` makes the ratio of their norms of them.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].detach().float()
        for ending, tensor in ((OUTPUT, output.detach().float() - x), (INPUT, x)):
            found[f"added_{name}{ending}"] = found.get(f"added_{name}{ending}", 0) + tensor.square().sum()

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.cross_attentions().items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def with_added_shares(values: Mapping[str, float]) -> dict[str, float]:
    """The sums of `added_terms` among `values` -> "added_<module>": norm of the added term / norm of its input."""
    found = {name: value for name, value in values.items() if not name.endswith((OUTPUT, INPUT))}
    for name in (name.removesuffix(INPUT) for name in values if name.endswith(INPUT)):
        found[name] = math.sqrt(values[name + OUTPUT] / values[name + INPUT])
    return found


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


def add_up(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values, without gradient, to those of the same name."""
    for name, value in values.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def to_floats(
    steps: Sequence[Mapping[str, Tensor]], over_all: Callable[[Tensor], Tensor] = lambda numbers: numbers
) -> list[dict[str, float]]:
    """Python floats, brought from the device in one go; `over_all` may change the numbers as a whole, [n] float64."""
    numbers = torch.stack([value.detach().float() for values in steps for value in values.values()])
    floats = iter(over_all(numbers.double().cpu()).tolist())
    return [{name: next(floats) for name in values} for values in steps]


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
