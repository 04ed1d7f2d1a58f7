"""The calibration of a run's model, on images that it did not train on where there are some."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, zip_longest

import numpy as np
import torch

from dataset.loading import make_loader
from dataset.records import Record
from dataset.sets import canonical_name
from dataset.transforms import Transform
from utils import calibration, processes
from utils.judging import Detector, judge_batches
from utils.logs import progress
from utils.options import completed
from utils.settings import Settings
from utils.training.data import TrainingData
from utils.training.plan import Plan

logger = logging.getLogger(__name__)

# Three numbers are fitted: more images of a kind would cost time and change little.
IMAGES_OF_A_KIND = 200


def calibrate(
    detector: Detector, data: TrainingData, plan: Plan, num_workers: int, after_batch: Callable[[], None]
) -> dict | None:
    """`Calibration` of a run's model, as checkpoints hold it; on held-out images, else on those it trained on.

    At most IMAGES_OF_A_KIND are drawn of each kind, by the seed. None, with a warning, where one kind is missing; and
    in other processes than the first, which all take part.
    """
    settings = plan.settings
    held_out = bool(data.held_out) and not _base_saw_held_out(plan.base, settings)
    records = _draw_kinds(data.held_out or data.train, IMAGES_OF_A_KIND, settings.seed)
    backbone, batch_size = detector.model.backbone, settings.text_batch_size
    images = data.images(records, Transform(backbone.img_size))
    loader = make_loader(images, batch_size, num_workers, device=backbone.device, take=processes.own_turns)
    turns = math.ceil(len(images) / batch_size / processes.count())
    batches = progress(loader, desc=f"calibration{processes.share()}", leave=False, total=turns)
    own, pixels = [], calibration.MapCounts()
    for batch, (found,) in judge_batches([detector], batches, after_batch):
        masked = batch["has_mask"]
        pixels.add(found.maps.cpu()[masked].numpy(), batch["mask"][masked, 0].numpy())
        maps = found.maps.flatten(1)
        own.append([found.detection_scores.tolist(), maps.amax(dim=1).tolist(), maps.amin(dim=1).tolist()])
        own[-1].append(batch["label"].tolist())
    pixels.counts = processes.total(torch.from_numpy(pixels.counts)).numpy()
    if not (parts := processes.for_first(own)):
        return None
    in_order = [batch for turn in zip_longest(*parts) for batch in turn if batch]
    scores, highest, lowest, labels = (list(chain(*column)) for column in zip(*in_order, strict=True))
    span = min(lowest), max(highest)
    fitted = calibration.fit(scores, highest, labels, span, held_out, pixels.best_threshold())
    if fitted is None:
        logger.warning("No calibration: the images are all of one kind, so a decision cannot be fitted.")
        return None
    return asdict(fitted)


def _base_saw_held_out(base: dict, settings: Settings) -> bool:
    """Whether the base may have trained on the images that are held out now."""
    seen = {canonical_name(name) for name in base.get("datasets", [])}
    if not seen & {canonical_name(settings.dataset), "unknown"}:
        return False
    same = ("dataset", "seed", "val_fraction", "val_classes", "shot")
    own = completed(Settings, base.get("training") or {})
    return any(own.get(name) != getattr(settings, name) for name in same)


def _draw_kinds(records: list[Record], most: int, seed: int) -> list[Record]:
    """At most `most` normal and as many anomalous records, drawn by `seed`, in their order."""
    rng = np.random.default_rng(seed)
    rows = []
    for label in (0, 1):
        kind = [row for row, record in enumerate(records) if record.label == label]
        rows += rng.permutation(kind)[:most].tolist()
    return [records[row] for row in sorted(rows)]
