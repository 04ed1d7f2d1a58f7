"""What is said of single images: scores, a decision, regions, words and colours. Known without PyTorch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import cv2
import numpy as np
from PIL import Image

from dataset.images import as_rgb, at_model_size, read_image, size_on_disk
from utils.calibration import Calibration

T = TypeVar("T")
# A file, an open image, or pixels: uint8 [height, width, 3], red first, or grey ones [height, width].
Given = str | Path | Image.Image | np.ndarray
Several = list[Any] | tuple[Any, ...]
# What a batch of images has in memory grows with it, and on a CPU it gains little.
BATCH_SIZE = 8


@dataclass(frozen=True)
class Region:
    """A connected part of an image, neighbours over corners too, whose map is at the threshold or above it.

    In px of the image: `box`, its left, top, width and height; `area`; `outline`, polygons [x, y, x, y, ...] around it,
    with holes filled. `peak` is the highest value of the map in it.
    """

    box: tuple[float, float, float, float]
    area: float
    peak: float
    outline: list[list[float]]


@dataclass(frozen=True)
class Verdict:
    """What a model says of one image.

    `single_score`, about 0 to 1, needs no other image; `detection_score` and `highest`, the highest value of `map`
    [S, S], are what it is made of. `probability` and `anomalous` are None where the checkpoint has no calibration.
    `size`: width and height of the image, px. `map_threshold`: from which value on a pixel belongs to a region; None
    where that is not known.
    """

    single_score: float
    detection_score: float
    highest: float
    probability: float | None
    anomalous: bool | None
    map: np.ndarray
    size: tuple[int, int]
    map_threshold: float | None

    @cached_property
    def regions(self) -> list[Region] | None:
        """The regions, highest peak first; None where there is no threshold for maps."""
        return None if self.map_threshold is None else find_regions(self.map, self.map_threshold, self.size)


class Judged(NamedTuple):
    """Of B images: `maps` [B, S, S], `detection_scores` [B] and `single_scores` [B], see `Verdict`."""

    maps: np.ndarray
    detection_scores: np.ndarray
    single_scores: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageJudge(ABC):
    """What judges single images of one class.

    `bits` of the values of images that it reads, if their files have 16; `reduced_to` as in `read_image`.
    `map_threshold`: of regions, in values of the map; without it the calibration's.
    """

    name: str
    calibration: Calibration | None
    bits: int = 16
    reduced_to: int | None = None
    map_threshold: float | None = None

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 16:
            raise ValueError(f"bits {self.bits}: expected 8 to 16.")
        if self.map_threshold is not None and not math.isfinite(self.map_threshold):
            raise ValueError(f"map_threshold {self.map_threshold}: expected a finite number.")

    @property
    @abstractmethod
    def img_size(self) -> int:
        """Side of the square images that the model takes, px."""

    @abstractmethod
    def judge(self, pixels: np.ndarray) -> Judged:
        """Maps and scores of images [B, S, S, 3], uint8, red first."""

    @property
    def region_threshold(self) -> float | None:
        """From which map value on a pixel belongs to a region; None where that is not known."""
        if self.map_threshold is not None or self.calibration is None:
            return self.map_threshold
        return self.calibration.map_threshold

    def read(self, path: Path) -> Image.Image:
        """An image file as it is judged. Raises ValueError where it is not readable."""
        return read_image(path, self.bits, self.reduced_to)

    @overload
    def __call__(self, image: Given, batch_size: int = BATCH_SIZE) -> Verdict: ...

    @overload
    def __call__(self, image: Several, batch_size: int = BATCH_SIZE) -> list[Verdict]: ...

    def __call__(self, image: Given | Several, batch_size: int = BATCH_SIZE) -> Verdict | list[Verdict]:
        """Judge an image, or each of a list or tuple of them, `batch_size` at a time; none affects another.

        An image is a file, an open Pillow image, or its pixels: [height, width, 3], red first, or grey ones
        [height, width], of type uint8. Raises ValueError, which names the image, for others, where a file is not
        readable as an image, and where a map or score is not finite. Each verdict keeps its map, so of thousands of
        images give some at a time.
        """
        if isinstance(image, (list, tuple)):
            return [verdict for part in _in_batches(image, batch_size) for verdict in self._judge_all(part)]
        return self._judge_all([(None, image)])[0]

    def _judge_all(self, images: Sequence[tuple[int | None, Given]]) -> list[Verdict]:
        """The verdicts on images, each with its place in the list that was given."""
        pixels, sizes = [], []
        for number, image in images:
            picture = self._picture(image, _called(image, number))
            sizes.append(self._whole_size(image, picture))
            pixels.append(np.asarray(at_model_size(picture, self.img_size)))
        found = self.judge(np.stack(pixels))
        for row, (number, image) in enumerate(images):
            if not np.isfinite([found.maps[row].max(), found.maps[row].min(), found.detection_scores[row]]).all():
                raise ValueError(f"{_called(image, number)}: the model's map or score is not finite.")
        return [self.verdict(*of_image) for of_image in zip(*found, sizes, strict=True)]

    def _whole_size(self, image: Given, picture: Image.Image) -> tuple[int, int]:
        """Width and height of an image, which may have been read at reduced size."""
        reduced = self.reduced_to is not None and isinstance(image, (str, Path))
        return size_on_disk(Path(str(image))) if reduced else picture.size

    def _picture(self, image: Given, called: str) -> Image.Image:
        if isinstance(image, (str, Path)):
            return self.read(Path(image))
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
                raise ValueError(
                    f"{called}: pixels of type {image.dtype} and shape {list(image.shape)}; expected uint8, [height, "
                    "width, 3] or [height, width]"
                )
            if not image.size:
                raise ValueError(f"{called}: expected pixels, found none: shape {list(image.shape)}")
            image = Image.fromarray(np.ascontiguousarray(image))
        if not isinstance(image, Image.Image):
            raise ValueError(f"{called}: expected a file, a Pillow image or an array, found {type(image).__name__}")
        return as_rgb(image, self.bits)

    def verdict(self, values: np.ndarray, detection: float, single: float, size: tuple[int, int]) -> Verdict:
        """What a map [S, S], a detection score and a single-image score say of an image of `size`, width and height."""
        detection, highest = float(detection), float(values.max())
        probability = anomalous = None
        if self.calibration is not None:
            probabilities = self.calibration.probabilities(np.array(detection), np.array(highest))
            probability, anomalous = probabilities.item(), bool(self.calibration.decisions(probabilities))
        return Verdict(float(single), detection, highest, probability, anomalous, values, size, self.region_threshold)


def verdicts_on(path: Path, judges: Sequence[ImageJudge]) -> dict[str, Verdict]:
    """{name: verdict} of several judges on a file, which is read once where all read it whole."""
    whole = {(judge.bits, judge.reduced_to) for judge in judges} == {(judges[0].bits, None)}
    image = judges[0].read(path) if whole else path
    return {judge.name: judge(image) for judge in judges}


def _in_batches(images: Sequence[T], size: int) -> Iterator[list[tuple[int, T]]]:
    if size < 1:
        raise ValueError(f"batch_size {size}: expected at least 1")
    numbered = enumerate(images)
    while part := list(islice(numbered, size)):
        yield part


def _called(image: object, number: int | None) -> str:
    """An image in messages."""
    return str(image) if isinstance(image, (str, Path)) else "the image" if number is None else f"image {number}"


def find_regions(values: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Region]:
    """The regions of a map [S, S] of an image of `size`, its width and height in px; highest peak first."""
    above = (values >= threshold).astype(np.uint8)
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    across, down = size[0] / values.shape[1], size[1] / values.shape[0]
    found = []
    for number in range(1, count):  # 0 is what is below the threshold
        left, top, width, height, area = (int(value) for value in boxes[number])
        part = labels[top : top + height, left : left + width] == number
        box = (left * across, top * down, width * across, height * down)
        outline = [
            [float(value) for x, y in around for value in ((left + x) * across, (top + y) * down)]
            for around in _outlines(part)
        ]
        peak = float(values[top : top + height, left : left + width][part].max())
        found.append(Region(box, area * across * down, peak, outline))
    return sorted(found, key=lambda region: -region.peak)


def _outlines(part: np.ndarray) -> list[np.ndarray]:
    """Polygons around what is True in [h, w], each [points, 2], x first: pixel 0 goes from 0 to 1."""
    # OpenCV draws through the middle of pixels; of ones half as large the nearest edge of a whole one is clear.
    doubled = part.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    around, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(points[:, 0] + 1) // 2 for points in around]


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
    judges: Sequence[ImageJudge], seen: tuple[float, float], of_what: str
) -> tuple[list[tuple[float, float]], str]:
    """What each model's maps are scaled by where single images are judged, and what that is called.

    A model's extremes on images of training make pictures of different images comparable; where one has no
    calibration, all take `seen`, the extremes `of_what`.
    """
    fitted = [judge.calibration.map_range for judge in judges if judge.calibration]
    if len(fitted) == len(judges):
        return fitted, "a model's extremes on images of training"
    return [seen] * len(judges), f"the extremes of {of_what}"
