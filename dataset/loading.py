"""Batches of a data set, in an order and with an augmentation that no worker, cache or restart can change."""

import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler
from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict

from dataset.images import read_record, readers, size_on_disk
from dataset.records import Record
from dataset.resized import ResizedImages
from dataset.transforms import Transform

logger = logging.getLogger(__name__)


class ImageCache:
    """Decoded images and masks of `records` in one block of memory, which reading processes share.

    They are kept as `transform` takes them first: at the model's size where it resizes before all else, at their own
    where it does not. `size` is in bytes.
    """

    def __init__(self, folder: Path, records: list[Record], transform: Transform):
        self.folder, self.transform, self.size = folder, transform, 0
        # Where the image of a record lies, and its mask: (first byte, shape).
        self.parts: dict[Record, list[tuple[int, tuple[int, ...]]]] = {}
        for record in records:
            parts = self.parts[record] = []
            for path, channels, to in ((record.image_path, (3,), record.reduced_to), (record.mask_path, (), None)):
                if path:
                    width, height = self._size_of(folder / path, to)
                    parts.append((self.size, (height, width, *channels)))
                    self.size += math.prod(parts[-1][1])

    def _size_of(self, path: Path, reduced_to: int | None) -> tuple[int, int]:
        return (self.transform.img_size,) * 2 if self.transform.resize_first else size_on_disk(path, reduced_to)

    def fill(self) -> None:
        """Read all files. Raises ValueError for one that is not readable."""
        self.pixels = torch.empty(self.size, dtype=torch.uint8)
        with readers() as pool:
            loaded = pool.map(self._load, self.parts)
            for _ in tqdm(loaded, total=len(self.parts), desc="reading images into memory", leave=False, disable=None):
                pass

    def _load(self, record: Record) -> None:
        image, mask = read_record(self.folder, record)
        if self.transform.resize_first:
            image, mask = self.transform.resize(image, mask)
        for (start, shape), picture in zip(self.parts[record], (image, mask), strict=False):  # mask: None, or a part
            self.pixels[start : start + math.prod(shape)] = torch.from_numpy(np.array(picture)).flatten()

    def serves(self, transform: Transform) -> bool:
        """Whether a transform makes the same of these images as of those in the files."""
        return transform.takes_resized or not self.transform.resize_first

    def read(self, record: Record) -> tuple[Image.Image, Image.Image | None]:
        """The image of a record and its mask, None where it has none."""
        pictures = [
            Image.fromarray(self.pixels[start : start + math.prod(shape)].view(shape).numpy())
            for start, shape in self.parts[record]
        ]
        return pictures[0], pictures[1] if len(pictures) > 1 else None


def cache_images(folder: Path, records: list[Record], transform: Transform, times: int = 1) -> ImageCache | None:
    """All images in memory; None, with a warning, where they would take more than half of what is free.

    So many `times` they are kept on this machine, by processes that each do this.
    """
    cache, free = ImageCache(folder, records, transform), psutil.virtual_memory().available
    sizes = f"{times * cache.size / 1e9:.2f} GB of decoded images, {free / 1e9:.1f} GB of memory free"
    if times * cache.size > free / 2:
        logger.warning("--cache_images: %s: too much, so every epoch reads the files.", sizes)
        return None
    logger.info("--cache_images: %s.", sizes)
    cache.fill()
    return cache


class Item(TypedDict):
    """An image, transformed: `image` [3, S, S], `mask` [1, S, S], `label` 0 or 1.

    `has_mask`: normal images have one, all zero. `emptied`: resizing or augmentation left nothing of the defect.
    `other` [3, S, S]: its partner, where the data set has partners.
    """

    image: Tensor
    mask: Tensor
    label: int
    has_mask: bool
    emptied: bool
    class_name: str
    path: str
    other: NotRequired[Tensor]


class Batch(TypedDict):
    """B items as a loader gives them: tensors [B, ...], of numbers and truth values [B], and lists of B texts."""

    image: Tensor
    mask: Tensor
    label: Tensor
    has_mask: Tensor
    emptied: Tensor
    class_name: list[str]
    path: list[str]
    other: NotRequired[Tensor]


class AnomalyDataset(Dataset[Item]):
    """Items of `records`; one that is augmented is asked for by (index, seed), and comes of that seed alone.

    The global generator is neither used nor moved. `partners`: of each record, the one whose image comes with it.
    """

    def __init__(
        self,
        folder: Path,
        records: list[Record],
        transform: Transform,
        cache: ImageCache | ResizedImages | None = None,
        partners: dict[Record, Record] | None = None,
    ):
        self.folder, self.records, self.transform, self.cache = folder, records, transform, cache
        self.partners = partners

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        index, seed = key if isinstance(key, tuple) else (key, None)
        if seed is None and self.transform.augments:
            raise ValueError(f"Item {index} is augmented, so it needs a seed: expected (index, seed), found an index.")
        record = self.records[index]
        path = self.folder / record.image_path
        image, mask = self._read(record)
        other = self._read(self.partners[record])[0] if self.partners else None
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            pixels, target = self.transform(image, mask)
            partner = None if other is None else self.transform(other, None)[0]
        item: Item = {
            "image": pixels,
            "mask": target,
            "label": record.label,
            "has_mask": record.has_mask,
            "emptied": mask is not None and not target.any().item(),
            "class_name": record.class_name,
            "path": str(path),
        }
        if partner is not None:
            item["other"] = partner
        return item

    def _read(self, record: Record) -> tuple[Image.Image, Image.Image | None]:
        if self.cache is not None and self.cache.serves(self.transform):
            return self.cache.read(record)
        return read_record(self.folder, record)


class SeededSampler(Sampler[tuple[int, int]]):
    """(index, seed) of each sample in a shuffled order that depends on `key`, epoch and index alone.

    `set_epoch(epoch, skip)` chooses the epoch and leaves out its first `skip` samples, to continue within it.
    """

    def __init__(self, length: int, key: tuple[int, ...]):
        self.length, self.key = length, key
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.length - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((*self.key, self.epoch)).permutation(self.length)
        for index in order[self.skip :].tolist():
            yield index, int(np.random.SeedSequence((*self.key, self.epoch, index)).generate_state(1)[0])


# From the batches of a job, each a list of what a data set is asked for, to those that are loaded here.
Take = Callable[[Iterable[list]], Iterable[list]]


class TakenBatches(Sampler[list]):
    """Of the batches of `whole` those that `take` makes of them, in each epoch anew."""

    def __init__(self, whole: Iterable[list], take: Take):
        self.whole, self.take = whole, take

    def __iter__(self) -> Iterator[list]:
        yield from self.take(self.whole)


def outlive_signals(worker: int = 0) -> None:
    """Signals to a group of processes reach those that read images too; the main one decides when they end.

    Were they gone before it, PyTorch would break off the running step, and with it what is not yet saved.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """End this process where the SIGTERM that it blocks comes from its parent, as multiprocessing ends processes."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(1)


def make_loader(
    dataset: AnomalyDataset,
    batch_size: int,
    num_workers: int,
    sampler: SeededSampler | None = None,
    device: torch.device | None = None,
    take: Take | None = None,
) -> DataLoader:
    """Each `Batch` in order, or in that of `sampler`; the last short one is kept. `device` is where batches will go.

    `take`: to the batches, of (index, seed) or index, that are wanted instead.
    """
    order: Any = SequentialSampler(dataset) if sampler is None else sampler  # one may be empty
    batches = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(
        dataset,
        batch_sampler=TakenBatches(batches, take) if take else batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=outlive_signals,
        pin_memory=device is not None and device.type == "cuda",
        # Of its own, so that loading never advances the global generator.
        generator=torch.Generator().manual_seed(0),
    )
