"""Where things are and what computes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from utils import processes

if TYPE_CHECKING:
    import torch

# Processes that read images for one GPU: more only take memory.
MOST_WORKERS = 16


@dataclass(frozen=True)
class Machine:
    """What a run has at hand, and what becomes of files that are broken. `device_name` is PyTorch's."""

    device_name: str
    clip_weights: Path | None
    data_root: Path
    num_workers: int
    follow_links: bool = False
    skip_broken: bool = False
    resized_images: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device. Raises ValueError where PyTorch cannot use it."""
        return device_of(self.device_name)


def device_of(name: str | None) -> torch.device:
    """The device called `name`; None for a GPU where there is one. Raises ValueError where PyTorch cannot use it.

    Where several processes run on a machine, "cuda" is a GPU for each.
    """
    import torch

    name = name or default_device()
    if processes.count_here() > 1 and name.startswith("cuda"):
        name = _own_gpu(name)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors that hold nothing
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where this process talks to the others from
    except (RuntimeError, AssertionError) as error:  # an unknown name; a PyTorch built without CUDA
        raise ValueError(f"--device {name}: not usable here ({shorten(str(error), 160)}).") from error
    return device


def _own_gpu(name: str) -> str:
    """The GPU of this process among those on its machine. Raises ValueError where there is none for each."""
    if name != "cuda":
        raise ValueError(f"--device {name}: several processes cannot share it. Give cuda, and each takes one.")
    import torch

    there, needed = torch.cuda.device_count(), processes.count_here()
    if 0 < there < needed:
        raise ValueError(f"--device cuda: {needed} processes on a machine with {there} GPUs. Start one for each.")
    return f"cuda:{processes.number_here()}"


def default_device() -> str:
    """A GPU's name where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def is_cuda(device_name: str) -> bool:
    """Whether the device of that name is a GPU of CUDA."""
    return device_name.startswith("cuda")


def own_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device_name: str) -> int:
    """How many processes read images for a device: on a GPU its share of the processors that this process may use.

    torchrun says by LOCAL_WORLD_SIZE how many share them. Beside a CPU that computes, none.
    """
    if not is_cuda(device_name):
        return 0
    return min(max(own_processors() // processes.count_here(), 1), MOST_WORKERS)


def take_tf32(wanted: bool) -> None:
    """Have CUDA round the factors of float32 products to 10 bits, or not: PyTorch alone would for convolutions."""
    import torch

    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


@cache
def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile finds no compiler for `device`, which it otherwise says in a traceback."""
    import torch

    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except RuntimeError as error:
        reason = shorten(str(error).partition("\n")[0], 160)
        raise ValueError(
            f"--compile: PyTorch cannot compile for {device} here ({reason}). It needs a C++ compiler such as g++"
            f"{', and Triton' if device.type == 'cuda' else ''}. Install it, or leave the flag out."
        ) from error
