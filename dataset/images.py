"""Images and masks as tensors, with AA-CLIP's augmentation, drawn from seeds that no worker or restart can change."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from dataset.records import Record


def read_image(path: Path) -> Image.Image:
    """An RGB image. Raises ValueError where the file cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
        raise ValueError(f"{path}: not readable as an image ({error}).") from error


def read_mask(path: Path) -> Image.Image:
    """A mask of an anomalous image, 0 or 255. Raises ValueError where it is unreadable or has no defect in it."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image.convert("L")) != 0
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not readable as a mask ({error}).") from error
    if not mask.any():
        raise ValueError(
            f"{path}: the mask of an anomalous image is empty; mend it, or leave mask_path out of its line."
        )
    return Image.fromarray(mask.astype(np.uint8) * 255)


def check_files(folder: Path, records: list[Record]) -> None:
    """Open every image and read every mask once, so that a bad one is found before training.

    Of images only the header is read. Raises ValueError that names the file.
    """
    with ThreadPoolExecutor() as pool:
        checked = pool.map(lambda record: _check_record(folder, record), records)
        for _ in tqdm(checked, total=len(records), desc="checking images and masks", leave=False, disable=None):
            pass


def _check_record(folder: Path, record: Record) -> None:
    try:
        Image.open(folder / record.image_path).close()
    except OSError as error:
        raise ValueError(f"{folder / record.image_path}: not readable as an image ({error}).") from error
    if record.mask_path:
        read_mask(folder / record.mask_path)


class Transform:
    """PIL image and mask -> normalised pixels [3, S, S] and mask [1, S, S] of 0 and 1.

    `stage` None: no augmentation. "text": rotation, translation and flips of image and mask together. "image": these,
    after brightness, contrast and saturation jitter of the full-size image.
    """

    def __init__(self, img_size: int, stage: str | None = None):
        self.img_size = img_size
        self.jitter = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(**{kind: 0.5})], p=0.7)
                for kind in ("brightness", "contrast", "saturation")
            ]
            if stage == "image"
            else [v2.Identity()]
        )
        # Pixels are normalised before they are moved, so that the fill of 0 is CLIP's mean colour.
        nearest = InterpolationMode.NEAREST
        self.move = v2.Compose(
            [
                v2.RandomApply([v2.RandomRotation(30, nearest, fill=0)], p=0.5),
                v2.RandomApply([v2.RandomAffine(0, translate=(0.15, 0.15), interpolation=nearest, fill=0)], p=0.5),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomVerticalFlip(0.5),
            ]
            if stage
            else [v2.Identity()]
        )
        self.to_pixels = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)]
        )

    def __call__(self, image: Image.Image, mask: Image.Image | None) -> tuple[Tensor, Tensor]:
        size = (self.img_size, self.img_size)
        pixels = self.to_pixels(self.jitter(image).resize(size, Image.Resampling.BICUBIC))
        target = torch.zeros(1, *size)
        if mask is not None:
            target[0] = torch.from_numpy(np.array(mask.resize(size, Image.Resampling.NEAREST)) != 0)
        pixels, target = self.move(pixels, tv_tensors.Mask(target))
        return pixels.as_subclass(Tensor), target.as_subclass(Tensor)


class AnomalyDataset(Dataset):
    """Items of `records`; with a `stage`, each is asked for by (index, seed) and augmented from that seed alone.

    An item: `image` [3, S, S], `mask` [1, S, S], `label` 0 or 1, `has_mask` (normal images have one, all zero),
    `emptied` (resizing or augmentation left nothing of the defect), `class_name` and `path`.
    """

    def __init__(self, folder: Path, records: list[Record], img_size: int, stage: str | None = None):
        self.folder = folder
        self.records = records
        self.transform = Transform(img_size, stage)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, seed = key if isinstance(key, tuple) else (key, None)
        record = self.records[index]
        path = self.folder / record.image_path
        image = read_image(path)
        mask = read_mask(self.folder / record.mask_path) if record.mask_path else None
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            pixels, target = self.transform(image, mask)
        return {
            "image": pixels,
            "mask": target,
            "label": record.label,
            "has_mask": record.label == 0 or mask is not None,
            "emptied": mask is not None and not target.any().item(),
            "class_name": record.class_name,
            "path": str(path),
        }


class SeededSampler(Sampler):
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


def loader_message(error: Exception) -> str:
    """Message of an error, without the traceback that PyTorch puts around one from a worker process."""
    return str(error).rpartition(f"\n{type(error).__name__}: ")[2].strip()


def ignore_interrupt(worker: int = 0) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides when workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    dataset: AnomalyDataset, batch_size: int, num_workers: int, sampler: SeededSampler | None = None
) -> DataLoader:
    """Batches in order, or in that of `sampler`; the last short one is kept."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_interrupt,
        pin_memory=torch.cuda.is_available(),
        # Of its own, so that loading never advances the global generator.
        generator=torch.Generator().manual_seed(0),
    )
