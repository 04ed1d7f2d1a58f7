"""Models judge images: the loop over batches, the verdict on one image, and how both are put in words and colours."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.constants import BLUR, describe_class
from dataset.images import as_rgb, read_image, reduced_for
from dataset.loading import Batch
from dataset.transforms import Transform
from forward_utils_cross_attention import ClassText, Prediction, PromptBank, known_patches, predict
from model.adapter_cross_attention import CrossAttentionCLIP
from utils.calibration import Calibration
from utils.checkpoints import checkpoint_names, checkpoints_of
from utils.machine import device_of
from utils.models import ModelLoader


@dataclass(frozen=True)
class Verdict:
    """What a model says of one image.

    `single_score`, about 0 to 1, needs no other image; `detection_score` and `highest`, the highest value of `map`
    [S, S], are what it is made of. `probability` and `anomalous` are None where the checkpoint has no calibration.
    """

    single_score: float
    detection_score: float
    highest: float
    probability: float | None
    anomalous: bool | None
    map: np.ndarray


@dataclass(frozen=True)
class Detector:
    """A trained model that judges images of the classes of `text`; `known`, of good images, as in `encode`.

    `bits` of the values of images that it reads, if their files have 16; `reduced_to` as in `read_image`.
    """

    name: str
    model: CrossAttentionCLIP
    text: ClassText
    calibration: Calibration | None
    precision: str = "fp32"
    bits: int = 16
    reduced_to: int | None = None
    known: dict[str, list[Tensor]] | None = None

    @classmethod
    def of(
        cls,
        model: CrossAttentionCLIP,
        bank: PromptBank,
        calibration: Calibration | None = None,
        precision: str = "fp32",
        name: str = "",
        bits: int = 16,
        reduced_to: int | None = None,
    ) -> "Detector":
        """From a model whose text modules do not train meanwhile."""
        return cls(name, model, ClassText(model, bank, fixed=True), calibration, precision, bits, reduced_to)

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
    ) -> "Detector":
        """From a loop file or the folder of a base; the rest as predict.py's flags of these names.

        Raises FileNotFoundError or ValueError that say what was expected.
        """
        if domain not in BLUR:
            raise ValueError(f"domain '{domain}': expected {' or '.join(BLUR)}.")
        named = {"model_name": model_name, "img_size": img_size}
        flags = {name: value for name, value in named.items() if value is not None}
        loader = ModelLoader(device_of(device), Path(clip_weights) if clip_weights else None, flags)
        detectors = load_detectors([Path(ckpt)], class_name, domain, loader, precision, bits, reduced_jpeg)
        if len(detectors) > 1:
            raise ValueError(f"{ckpt}: a run of {len(detectors)} loops. Name one of its files.")
        return detectors[0]

    def read(self, path: Path) -> Image.Image:
        """An image file as it is judged. Raises ValueError where it is not readable."""
        return read_image(path, self.bits, self.reduced_to)

    def seeing(self, normal_images: dict[str, list[Path]]) -> "Detector":
        """The same, with text cross-attention that sees images of each class which are known to be good.

        A model that does not see them is returned as it is. Raises ValueError where a file is not readable as an image.
        """
        if not self.model.sees_known_images:
            return self
        transform = Transform(self.model.backbone.img_size)
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

    def verdict(self, found: Prediction) -> Verdict:
        """What a prediction of one image says."""
        detection, highest = found.detection_scores.item(), found.maps.max().item()
        probability = anomalous = None
        if self.calibration is not None:
            probabilities = self.calibration.probabilities(np.array(detection), np.array(highest))
            probability, anomalous = probabilities.item(), bool(self.calibration.decisions(probabilities))
        single = found.single_scores.item()
        return Verdict(single, detection, highest, probability, anomalous, found.maps[0].cpu().numpy())

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Verdict:
        """Judge an image of the one class that the detector knows: a file, an open one, or its pixels.

        Pixels are [height, width, 3], red first, or grey ones [height, width], of type uint8. Raises ValueError for
        others, where a file is not readable as an image, and where a map or score is not finite.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
                raise ValueError(
                    f"pixels of type {image.dtype} and shape {list(image.shape)}; expected uint8, [height, width, 3] "
                    "or [height, width]"
                )
            image = Image.fromarray(np.ascontiguousarray(image))
        if isinstance(image, Image.Image):
            picture, name = as_rgb(image, self.bits), "the image"
        else:
            picture, name = self.read(Path(image)), str(image)
        pixels, _ = Transform(self.model.backbone.img_size)(picture, None)
        if len(self.text.bank.index) > 1:
            raise ValueError(
                f"A detector of one class judges an image; this one knows {', '.join(self.text.bank.index)}."
            )
        (class_name,) = self.text.bank.index
        return self.verdict(self.predict(pixels[None], [class_name], [name]))


def load_detectors(
    paths: list[Path],
    class_name: str,
    domain: str,
    loader: ModelLoader,
    precision: str,
    bits: int,
    reduced_jpeg: bool = False,
) -> list[Detector]:
    """Detectors of all checkpoints that `paths` name, on one backbone, for images of one class with so many bits.

    `reduced_jpeg`: they read large JPEG files at reduced size. Raises ValueError for a model that looks at another
    image than the one that it judges.
    """
    named = [checkpoint for path in paths for checkpoint in checkpoints_of(path)]
    checkpoints = list({checkpoint.path.resolve(): checkpoint for checkpoint in named}.values())  # each once
    models = [loader(checkpoint) for checkpoint in checkpoints]
    for checkpoint, model in zip(checkpoints, models, strict=True):
        if model.sees_another_image:
            raise ValueError(
                f"{checkpoint.path}: a control, which looks at another image of a data set (--image_context another). "
                "test.py tests it; for single images take a model without this flag."
            )
    description, _ = describe_class("", class_name)
    reduced_to = reduced_for(loader.backbone.img_size) if reduced_jpeg else None
    bank = PromptBank(loader.backbone, {class_name: description}, domain)
    return [
        Detector.of(model, bank, checkpoint.calibration, precision, name, bits, reduced_to)
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


def scaled(values: np.ndarray, extremes: tuple[float, float]) -> np.ndarray:
    """A map brought from its model's extremes to 0..1, for pictures; values beyond them go beyond."""
    low, high = extremes
    return (values - low) / max(high - low, 1e-12)


def decision_word(anomalous: bool | None) -> str:
    """A decision in a word."""
    return "n/a" if anomalous is None else "anomalous" if anomalous else "normal"


def caption(kind: str, score: float, probability: float | None, anomalous: bool | None) -> str:
    """What stands beneath a map: a score, which `kind` names, and the decision where there is one."""
    text = f"{kind} score {score:.3f}"
    return text if probability is None else f"{text}\np {probability:.2f}: {decision_word(anomalous)}"


def calibrated_extremes(
    detectors: list[Detector], seen: tuple[float, float], of_what: str
) -> tuple[list[tuple[float, float]], str]:
    """What each model's maps are scaled by where single images are judged, and what that is called.

    A model's extremes on images of training make pictures of different images comparable; where one has no
    calibration, all take `seen`, the extremes `of_what`.
    """
    fitted = [detector.calibration.map_range for detector in detectors if detector.calibration]
    if len(fitted) == len(detectors):
        return fitted, "a model's extremes on images of training"
    return [seen] * len(detectors), f"the extremes of {of_what}"
