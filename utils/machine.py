"""Where things are and what computes."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch

from utils import processes


@dataclass(frozen=True)
class Machine:
    """What a run has at hand, and what becomes of files that are broken. `device_name` is PyTorch's."""

    device_name: str
    clip_weights: Path | None
    data_root: Path
    num_workers: int
    follow_links: bool = False
    skip_broken: bool = False

    @property
    def device(self) -> torch.device:
        """The device. Raises ValueError where PyTorch cannot use it."""
        return device_of(self.device_name)


def device_of(name: str | None) -> torch.device:
    """The device called `name`; None for a GPU where there is one. Raises ValueError where PyTorch cannot use it.

    Where several processes run on a machine, "cuda" is a GPU for each.
    """
    name = name or default_device()
    if processes.count_here() > 1 and name.startswith("cuda"):
        name = _own_gpu(name)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors that hold nothing
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where this process talks to the others from
    except (RuntimeError, AssertionError) as error:  # an unknown name; a PyTorch built without CUDA
        raise ValueError(f"--device {name}: not usable here ({shorten(str(error), 160)}).") from error
    return device


def _own_gpu(name: str) -> str:
    """The GPU of this process among those on its machine. Raises ValueError where there is none for each."""
    if name != "cuda":
        raise ValueError(f"--device {name}: several processes cannot share it. Give cuda, and each takes one.")
    there, needed = torch.cuda.device_count(), processes.count_here()
    if there < needed:
        raise ValueError(f"--device cuda: {needed} processes on a machine with {there} GPUs. Start one for each.")
    return f"cuda:{processes.number_here()}"


def default_device() -> str:
    """A GPU's name where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
