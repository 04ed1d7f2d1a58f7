"""Stage 1 on features that are seen once: what does not train is kept, so that later epochs have the text side alone.

Each image has one view for all epochs of a stage. Whole batches are kept, since V-V attention may go across them, and
come in another order in each epoch.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset.files import nearest_there
from dataset.loading import Batch
from forward_utils_cross_attention import Sight
from model.adapter_cross_attention import CrossAttentionCLIP
from utils import processes
from utils.logs import progress
from utils.training.steps import Piece, Step, Steps

logger = logging.getLogger(__name__)

# Of a batch, what Stage 1 has seen, and the mask, which is kept with what it saw.
APART = ("image", "other", "mask")


def bytes_of_image(model: CrossAttentionCLIP) -> int:
    """What is kept of an image: patch features in half precision, what they found of their like, and the mask."""
    backbone = model.backbone
    patches, levels = backbone.grid**2, len(backbone.levels)
    size = 2 * levels * patches * backbone.embed_dim + backbone.img_size**2
    if model.prompts_see_image:
        size += 2 * (patches + 1) * backbone.embed_dim
    if model.sees_known_images:
        size += 4 * levels * patches
    return size


def choose_place(model: CrossAttentionCLIP, images: int, folder: Path) -> Path | None:
    """None to keep the features of so many images in memory, else a folder in that of the run, by what is free.

    Says the size. Raises ValueError where neither has room, and for a model whose visual forward depends on what Stage
    1 trains.
    """
    if model.image_sees_prompts:
        raise ValueError(
            "--cache_features: with --cross_attn block the image side looks at prompts that Stage 1 trains, so its "
            "features change at each step. Leave the flag out, or give --no_image_cross_attn."
        )
    size = bytes_of_image(model) * images
    here = size * processes.count_here() // processes.count()
    memory = psutil.virtual_memory().available
    disk = shutil.disk_usage(nearest_there(folder)).free
    words = f"--cache_features: {size / 1e9:.3g} GB of features of {images} images"
    if here <= memory / 2:
        logger.info("%s, in memory, of which %.1f GB are free.", words, memory / 1e9)
        return None
    if here <= 0.9 * disk:
        place = folder / f"features_{processes.number()}"
        logger.info("%s, in %s, where %.1f GB are free.", words, place, disk / 1e9)
        return place
    raise ValueError(
        f"{words}: too much for the memory ({memory / 1e9:.1f} GB free, half of it to be used) and for the disk of "
        f"{folder} ({disk / 1e9:.1f} GB free). Leave the flag out, or choose another --save_path."
    )


def remove_kept(folder: Path) -> None:
    """Remove what killed processes kept in a run's folder."""
    for place in folder.glob("features_*"):
        shutil.rmtree(place, ignore_errors=True)


class Kept(NamedTuple):
    """A step without its tensors: those of each piece are elsewhere, under its number."""

    step: Step
    numbers: list[int]


class SeenSteps:
    """Steps with what was seen of each piece, kept in memory or in the folder `place`.

    They come in an order that depends on `key` and on the epoch alone.
    """

    def __init__(self, place: Path | None, key: tuple[int, ...]):
        self.place, self.key = place, key
        self.kept: list[Kept] = []
        self._count = 0
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def fill(
        self,
        steps: Steps,
        see: Callable[[Batch, list[int]], Sight],
        title: str = "",
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep what `see` sees in the steps of the first epoch; `after_batch` may end the work by an exception."""
        if self.place is not None:
            self.place.mkdir(parents=True, exist_ok=True)
        for step in progress(steps.epoch(), total=len(steps), desc=f"{title}: features", unit="batch"):
            numbers = [self._keep(piece, see(piece.batch, step.lengths)) for piece in step.pieces]
            bare = [piece._replace(batch=_without_images(piece.batch)) for piece in step.pieces]
            self.kept.append(Kept(step._replace(pieces=bare), numbers))
            after_batch()

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Step]:
        """The steps of an epoch but for the first `skip`."""
        order = np.random.default_rng((*self.key, number)).permutation(len(self.kept))
        for index in order[skip:].tolist():
            step, numbers = self.kept[index]
            yield step._replace(pieces=list(map(self._whole, step.pieces, numbers)))

    def close(self) -> None:
        """Forget all."""
        self._tensors.clear()
        if self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)

    def _keep(self, piece: Piece, sight: Sight) -> int:
        tensors = {"mask": piece.batch["mask"].bool(), "patches": torch.stack(sight.patches).half()}
        if sight.context is not None:
            tensors["context"] = sight.context.half()
        if sight.neighbours is not None:
            tensors["neighbours"] = sight.neighbours
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        number, self._count = self._count, self._count + 1
        if self.place is None:
            self._tensors[number] = tensors
        else:
            save_file(tensors, self.place / f"{number}.safetensors")
        return number

    def _whole(self, piece: Piece, number: int) -> Piece:
        tensors = self._tensors[number] if self.place is None else load_file(self.place / f"{number}.safetensors")
        context = tensors.get("context")
        sight = Sight(
            list(tensors["patches"].unbind()), None if context is None else context.float(), tensors.get("neighbours")
        )
        batch: Any = {**piece.batch, "mask": tensors["mask"].float()}
        return piece._replace(batch=batch, sight=sight)


def _without_images(batch: Batch) -> Batch:
    return cast(Batch, {name: value for name, value in batch.items() if name not in APART})
