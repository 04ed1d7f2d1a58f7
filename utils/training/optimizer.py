"""Adam over a stage's modules, and the learning rate of each step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from utils.settings import Settings
from utils.training.plan import Stage

ADAM_BETAS = (0.5, 0.999)
# Stage 2's learning rate is halved at these steps of the stage, as published.
MILESTONES = (16000, 32000)


def make_optimizer(modules: Mapping[str, nn.Module], stage: Stage, earlier: dict | None = None) -> torch.optim.Adam:
    """Adam with a group for each of the stage's modules; `earlier` is a state dict to go on from."""
    groups = [{"params": list(module.parameters())} for module in modules.values()]
    # On a GPU one kernel updates all weights; elsewhere PyTorch's choice. Either takes up the state of the other.
    fused = groups[0]["params"][0].is_cuda or None
    optimizer = torch.optim.Adam(groups, lr=stage.lr, betas=ADAM_BETAS, fused=fused)
    if earlier is not None:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": _fitting(earlier["state"], groups)})
    return optimizer


def _fitting(state: dict[int, dict[str, Tensor]], groups: list[dict]) -> dict[int, dict[str, Tensor]]:
    """Adam's state, where it is one of these parameters. Raises ValueError where it is not."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fits = not state or state.keys() == set(range(len(parameters)))
    for index, moments in state.items() if fits else ():
        shape, dtype = parameters[index].shape, parameters[index].dtype
        fits &= moments["step"].numel() == 1
        fits &= all(moments[name].shape == shape and moments[name].dtype == dtype for name in ("exp_avg", "exp_avg_sq"))
    if not fits:
        raise ValueError("the state of the optimiser is not of these modules. Choose another --save_path.")
    return state


def set_learning_rates(
    optimizer: torch.optim.Adam, stage: Stage, settings: Settings, step: int, steps: int
) -> dict[str, float]:
    """Give the groups their rates at `step` of the stage's `steps`; returns them by their columns of log.csv."""
    milestones = MILESTONES if stage.name == "image" else ()
    factor = learning_rate_factor(settings.lr_schedule, step, steps, settings.warmup_steps, milestones)
    rates = [rate * factor for rate in (stage.lr, stage.cross_attn_lr)]
    rates = rates[: len(optimizer.param_groups)]  # the cross-attention may be switched off
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return dict(zip(("lr", "lr_cross_attn"), rates, strict=False))


def learning_rate_factor(
    schedule: str, step: int, steps: int, warmup_steps: int, milestones: tuple[int, ...] = ()
) -> float:
    """What a learning rate is multiplied by at `step` of `steps`: warm-up, linear over `warmup_steps`, x schedule.

    "steps" halves at every milestone passed, as published; "cosine" goes from 1 at the first step to 0 at the end
    (https://arxiv.org/abs/1608.03983, without restarts).
    """
    warm_up = min(1.0, (step + 1) / (warmup_steps + 1))
    if schedule == "cosine":
        return warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm_up * 0.5 ** sum(step >= milestone for milestone in milestones)
