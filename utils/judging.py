"""Models judge images: the prediction of a batch, the verdict on one image, and the loop over batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.constants import BLUR, describe_class
from dataset.images import reduced_for
from dataset.loading import Batch
from dataset.records import check_class
from dataset.transforms import Transform, normalised
from forward_utils_cross_attention import ClassText, Prediction, PromptBank, known_patches, predict
from model.adapter_cross_attention import CrossAttentionCLIP
from utils.arguments import PRECISION
from utils.calibration import Calibration
from utils.checkpoints import Checkpoint, checkpoint_names, one_checkpoint
from utils.machine import device_of
from utils.models import ModelLoader
from utils.verdicts import ImageJudge, Judged


@dataclass(frozen=True, kw_only=True)
class Detector(ImageJudge):
    """A trained model that judges images of the classes of `text`; `known`, of good images, as in `encode`."""

    model: CrossAttentionCLIP
    text: ClassText
    precision: str = "fp32"
    known: dict[str, list[Tensor]] | None = None

    @classmethod
    def of(
        cls,
        model: CrossAttentionCLIP,
        bank: PromptBank,
        calibration: Calibration | None = None,
        precision: str = "fp32",
        name: str = "",
        **reading: Any,
    ) -> "Detector":
        """From a model whose text modules do not train meanwhile; `reading` as in `ImageJudge`."""
        text = ClassText(model, bank, fixed=True)
        return cls(name=name, calibration=calibration, model=model, text=text, precision=precision, **reading)

    @classmethod
    def load(
        cls,
        ckpt: str | Path,
        class_name: str = "object",
        domain: str = "industrial",
        device: str | None = None,
        precision: str = "fp32",
        clip_weights: str | Path | None = None,
        model_name: str | None = None,
        img_size: int | None = None,
        bits: int = 16,
        reduced_jpeg: bool = False,
        map_threshold: float | None = None,
    ) -> "Detector":
        """From a loop file or the folder of a base; the rest as predict.py's flags of these names.

        Raises FileNotFoundError or ValueError that say what was expected.
        """
        if domain not in BLUR:
            raise ValueError(f"domain '{domain}': expected {' or '.join(BLUR)}.")
        if precision not in PRECISION["choices"]:
            raise ValueError(f"precision '{precision}': expected {' or '.join(PRECISION['choices'])}.")
        check_class(class_name, "class_name")
        named = {"model_name": model_name, "img_size": img_size}
        flags = {name: value for name, value in named.items() if value is not None}
        loader = ModelLoader(device_of(device), Path(clip_weights) if clip_weights else None, flags)
        reading = bits, reduced_jpeg, map_threshold
        checkpoint = one_checkpoint(Path(ckpt))
        (detector,) = load_detectors([checkpoint], [class_name], domain, loader, precision, *reading)
        return detector

    @property
    def img_size(self) -> int:
        return self.model.backbone.img_size

    def seeing(self, normal_images: dict[str, list[Path]]) -> "Detector":
        """The same, with text cross-attention that sees images of each class which are known to be good.

        A model that does not see them is returned as it is. Raises ValueError where a file is not readable as an image.
        """
        if not self.model.sees_known_images:
            return self
        transform = Transform(self.img_size)
        known = {}
        for name, paths in normal_images.items():
            pixels = (transform(self.read(path), None)[0][None] for path in paths)
            seen = [
                known_patches(self.model, image.to(self.model.backbone.device), name, self.text, self.precision)
                for image in pixels
            ]
            known[name] = [torch.cat(level) for level in zip(*seen, strict=True)]
        return replace(self, known=known)

    def predict(
        self, images: Tensor, class_names: list[str], paths: list[str], other: Tensor | None = None
    ) -> Prediction:
        """Maps and scores of normalised pixels [B, 3, S, S]; `other` as in `encode`.

        Raises ValueError that names an image whose map or score is not finite.
        """
        pixels = images.to(self.model.backbone.device, non_blocking=True)
        found = predict(self.model, pixels, class_names, self.text, self.precision, self.known, other)
        finite = found.maps.flatten(1).isfinite().all(dim=1) & found.detection_scores.isfinite()
        for path, fine in zip(paths, finite.tolist(), strict=True):
            if not fine:
                raise ValueError(f"{path}: the model's map or score is not finite.")
        return found

    def judge(self, pixels: np.ndarray) -> Judged:
        if len(self.text.bank.index) > 1:
            raise ValueError(
                f"A detector of one class judges an image; this one knows {', '.join(self.text.bank.index)}."
            )
        (class_name,) = self.text.bank.index
        images = normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.model.backbone.device))
        found = predict(self.model, images, [class_name] * len(images), self.text, self.precision, self.known)
        return Judged(*(values.cpu().numpy() for values in found))


def load_detectors(
    checkpoints: list[Checkpoint],
    class_names: Sequence[str],
    domain: str,
    loader: ModelLoader,
    precision: str,
    bits: int = 16,
    reduced_jpeg: bool = False,
    map_threshold: float | None = None,
) -> list[Detector]:
    """Detectors of checkpoints, on one backbone, for images of some classes with so many bits.

    `reduced_jpeg`: they read large JPEG files at reduced size; `map_threshold` as in `ImageJudge`. Raises ValueError
    for a model that looks at another image than the one that it judges.
    """
    models = [loader(checkpoint) for checkpoint in checkpoints]
    for checkpoint, model in zip(checkpoints, models, strict=True):
        if model.sees_another_image:
            raise ValueError(
                f"{checkpoint.path}: a control, which looks at another image of a data set (--image_context another). "
                "test.py tests it; for single images take a model without this flag."
            )
    descriptions = {name: describe_class("", name)[0] for name in class_names}
    reading = {"bits": bits, "map_threshold": map_threshold}
    reading["reduced_to"] = reduced_for(loader.backbone.img_size) if reduced_jpeg else None
    bank = PromptBank(loader.backbone, descriptions, domain)
    return [
        Detector.of(model, bank, checkpoint.calibration, precision, name, **reading)
        for name, model, checkpoint in zip(checkpoint_names(checkpoints), models, checkpoints, strict=True)
    ]


def check_normal_images(models: Iterable[CrossAttentionCLIP]) -> None:
    """Raise ValueError where known good images make no difference to any of these models."""
    if not any(model.sees_known_images for model in models):
        raise ValueError(
            "--normal_images: none of these models sees them. Expected one with text cross-attention in the joint "
            "space, as train_cross_attention.py trains; leave the flag out for others."
        )


def judge_batches(
    detectors: list[Detector], batches: Iterable[Batch], after_batch: Callable[[], None] = lambda: None
) -> Iterator[tuple[Batch, list[Prediction]]]:
    """Batches, and every detector's predictions on them. `after_batch` may end the work by an exception.

    Raises ValueError that names an image where a prediction is not finite.
    """
    for batch in batches:
        parts = batch["image"], batch["class_name"], batch["path"], batch.get("other")
        yield batch, [detector.predict(*parts) for detector in detectors]
        after_batch()
