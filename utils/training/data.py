"""The images of a run: opened, drawn, held out, checked and, where they shall be, kept in memory."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dataset.loading import AnomalyDataset, ImageCache, cache_images
from dataset.prepare import prepare
from dataset.records import Record, digest, hold_out, hold_out_classes, partners
from dataset.resized import ResizedImages
from dataset.sets import draw_few_shot, open_dataset
from dataset.survey import survey, with_bits, with_reduced_jpeg
from dataset.transforms import Transform
from utils import processes
from utils.machine import Machine
from utils.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Records to train on and, with `--val_fraction` or `--val_classes`, those held out.

    `cache` has the images of both, in memory or resized on disk, None where every epoch reads the files. `partners`:
    which other image each is seen with, None where it is seen alone. The rest as in `dataset.sets.DataSet`.
    """

    folder: Path
    domain: str
    train: list[Record]
    held_out: list[Record]
    descriptions: dict[str, str]
    cache: ImageCache | ResizedImages | None = None
    partners: dict[Record, Record] | None = None

    @property
    def summary(self) -> dict:
        """Tells whether a run that goes on has the same images in the same order."""
        counts = {"images": len(self.train), "held_out": len(self.held_out)}
        return counts | {"sha256": digest(self.train + self.held_out)}

    def images(self, records: list[Record], transform: Transform) -> AnomalyDataset:
        """Some of the records as items for batches."""
        return AnomalyDataset(self.folder, records, transform, self.cache, self.partners)

    def with_partners(self, seed: int) -> "TrainingData":
        """The same, each image with another of its part. Raises ValueError where there is none."""
        return replace(self, partners=partners(self.train, seed) | partners(self.held_out, seed))


def load_training_data(settings: Settings, machine: Machine, img_size: int, in_memory: bool = False) -> TrainingData:
    """Open, draw and check the images of a run, and read them where they shall be kept `in_memory`.

    A demo set that is not there is rendered, a list that is missing is written. Raises ValueError or FileNotFoundError.
    """
    where, links = machine.data_root, machine.follow_links
    with processes.first_ahead():
        prepare(settings.dataset, where, links)
        data = open_dataset(settings.dataset, where, settings.domain, settings.class_name, links, machine.skip_broken)
    folder = data.folder
    data = replace(data, records=processes.once_here(partial(with_bits, folder, data.records, settings.bits)))
    if machine.skip_broken:  # before any are drawn, or held out
        data = replace(data, records=processes.once_here(partial(survey, folder, data.records, skip_broken=True)))
    resized = _resized_images(machine, folder, settings.augment, img_size)
    records = data.records
    if settings.shot is not None:
        records = draw_few_shot(data, settings.shot, settings.seed, settings.class_name)
    if not machine.skip_broken:
        records = processes.once_here(partial(survey, folder, records))
    if settings.reduced_jpeg:  # after the files were seen whole
        records = with_reduced_jpeg(records, img_size)
    train, held_out = _divide(records, settings)
    if not train or (settings.val_fraction and not held_out):
        counts = f"{len(train)} images to train on and {len(held_out)} held out"
        raise ValueError(f"--val_fraction {settings.val_fraction}: leaves {counts}.")
    first = Transform(img_size, augment=settings.augment)
    cached = cache_images(folder, records, first, processes.count_here()) if in_memory else None
    cache = cached or resized
    _report_maskless(train)
    return TrainingData(folder, data.domain, train, held_out, data.descriptions, cache)


def _resized_images(machine: Machine, folder: Path, augment: str, img_size: int) -> ResizedImages | None:
    """Those of --resized_images; said where a stage does not use them."""
    if machine.resized_images is None:
        return None
    if not Transform(img_size, "image", augment).takes_resized:
        logger.info("--resized_images: not for Stage 2, whose jitter acts on whole images, but with --augment smooth.")
    return ResizedImages(machine.resized_images, folder, img_size)


def _divide(records: list[Record], settings: Settings) -> tuple[list[Record], list[Record]]:
    """Those to train on and those held out."""
    if not settings.val_classes:
        return hold_out(records, settings.val_fraction, settings.seed)
    if settings.val_fraction:
        raise ValueError("--val_fraction and --val_classes both hold images out: give one of them.")
    try:
        return hold_out_classes(records, settings.val_classes, settings.seed)
    except ValueError as error:
        raise ValueError(f"--val_classes: {error}") from error


def _report_maskless(records: list[Record]) -> None:
    """Say once what becomes of anomalous images without a mask."""
    anomalous = [record for record in records if record.label]
    maskless = sum(record.mask_path is None for record in anomalous)
    if maskless:
        logger.info("%d of %d anomalous images have no mask: no segmentation loss.", maskless, len(anomalous))
    if maskless == len(anomalous):
        logger.warning("No image here shows where a defect is, so the anomaly maps learn to find none.")
