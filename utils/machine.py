"""Where things are and what computes."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch


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
    """The device called `name`; None for a GPU where there is one. Raises ValueError where PyTorch cannot use it."""
    name = name or default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors that hold nothing
    except (RuntimeError, AssertionError) as error:  # an unknown name; a PyTorch built without CUDA
        raise ValueError(f"--device {name}: not usable here ({shorten(str(error), 160)}).") from error
    return device


def default_device() -> str:
    """A GPU's name where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
