"""What models are tested on: a data set, with its prompts on one backbone and the way its images are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dataset.loading import AnomalyDataset, Batch, Take, make_loader
from dataset.records import Record, partners
from dataset.resized import ResizedImages
from dataset.sets import DataSet
from dataset.survey import with_reduced_jpeg
from dataset.transforms import Transform
from forward_utils_cross_attention import Prediction, PromptBank
from model.backbone import Backbone
from utils.files import LONGEST_NAME, safe_name
from utils.judging import Detector, judge_batches
from utils.testing.contenders import Contender

# Images per forward, where it is not told otherwise; results do not depend on it.
EVAL_BATCH = 8


class Batching(NamedTuple):
    """How images are read and go through the models; results depend on `precision` and `reduced_jpeg` alone."""

    batch_size: int
    num_workers: int
    precision: str
    reduced_jpeg: bool = False
    resized_images: Path | None = None


class Bench:
    """A data set to test models on that share a backbone.

    `normal_images`: {class: known good images} that models may see beside the tested ones; results then have a name of
    their own. Raises ValueError for a prompt that CLIP cannot read whole, and where the patch grid is too small for the
    domain.
    """

    def __init__(
        self, data: DataSet, backbone: Backbone, batching: Batching, normal_images: dict[str, list[Path]] | None = None
    ):
        name = f"{data.name}_normal_images" if normal_images else data.name
        if batching.reduced_jpeg:
            data = replace(data, records=with_reduced_jpeg(data.records, backbone.img_size))
        # Files are called so, with more before and behind.
        self.data = replace(
            data, name=name if len(name.encode("utf-8", "replace")) <= LONGEST_NAME else safe_name(name)
        )
        self.batching, self.normal_images = batching, normal_images
        self.bank = PromptBank(backbone, data.descriptions, data.domain)
        self._transform = Transform(backbone.img_size)
        place = batching.resized_images
        self._resized = ResizedImages(place, data.folder, backbone.img_size) if place else None

    @property
    def records(self) -> list[Record]:
        """All images, class by class."""
        return [record for class_name in self.data.descriptions for record in self.data.of_class(class_name)]

    def detector(self, contender: Contender) -> Detector:
        """The model of a contender, ready to judge images of the data set."""
        fitted = contender.checkpoint.calibration
        first = self.data.records[0]  # all are read alike
        reading = {"bits": first.bits, "reduced_to": first.reduced_to}
        detector = Detector.of(contender.model, self.bank, fitted, self.batching.precision, contender.name, **reading)
        return detector.seeing(self.normal_images) if self.normal_images else detector

    def predictions(
        self,
        contenders: Sequence[Contender],
        records: list[Record],
        after_batch: Callable[[], None] = lambda: None,
        num_workers: int | None = None,
        take: Take | None = None,
    ) -> Iterator[tuple[Batch, list[Prediction]]]:
        """Batches of `records`, and every contender's predictions on them; see `judge_batches` and `make_loader`."""
        others = None
        if any(contender.model.sees_another_image for contender in contenders):
            others = partners(self.records, seed=0)
        images = AnomalyDataset(self.data.folder, records, self._transform, self._resized, others)
        workers = self.batching.num_workers if num_workers is None else num_workers
        device = contenders[0].model.backbone.device
        batches = make_loader(images, self.batching.batch_size, workers, device=device, take=take)
        return judge_batches([self.detector(contender) for contender in contenders], batches, after_batch)
