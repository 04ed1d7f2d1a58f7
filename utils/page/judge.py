"""Photographs are judged: from files to what a page shows of them."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from dataset.words import on_one_line
from utils.judging import Detector
from utils.report.plots import MAP_COLOURS
from utils.verdicts import Verdict, decision_word, scaled

# Longer side of pictures, px.
PICTURE_SIZE = 480
# Files in one go: each is kept in memory as long as its page is open.
MOST_FILES = 20


@dataclass(frozen=True)
class Said:
    """What a model says of a photograph; `threshold` is its calibrated one. `picture` of its map: a data URL."""

    role: str
    model: str
    picture: str
    single_score: float
    probability: float | None
    threshold: float | None

    def decision(self, threshold: float | None) -> str:
        """From `threshold` on a probability is called anomalous."""
        return decision_word(None if self.probability is None or threshold is None else self.probability >= threshold)


@dataclass(frozen=True)
class Shown:
    """A photograph, `picture` a data URL, and what the base and the extended model, or one of them, say of it."""

    path: Path
    name: str
    picture: str
    said: list[Said]


@dataclass(frozen=True)
class Scale:
    """One scale of all maps, so that they can be compared: from the first of `ends` to the second.

    `zeros`: what is first taken from the map of each model. `unit`: what its values are, and where its ends are from.
    """

    zeros: list[float]
    ends: tuple[float, float]
    unit: str


@dataclass(frozen=True)
class Judgement:
    """What a page shows: photographs, the scale of all maps, and a sentence about each that `failed`."""

    shown: list[Shown]
    failed: list[str]
    scale: Scale | None = None


def judge(models: Mapping[str, Detector], files: Iterable[Path]) -> Judgement:
    """Every file that can be read, by every model {what it is: it}; all maps are drawn on one scale."""
    detectors = list(models.values())
    judged, failed = list[tuple[Path, Image.Image, list[Verdict]]](), list[str]()
    for path in files:
        try:
            image = detectors[0].read(path)
            judged.append((path, thumbnail(image), [detector(image) for detector in detectors]))
        except (ValueError, OSError) as error:
            failed.append(on_one_line(str(error).replace(str(path), path.name)))
    if not judged:
        return Judgement([], failed)
    scale = common_scale(detectors, [verdict.map for _, _, found in judged for verdict in found])
    shown = []
    for path, image, found in judged:
        of_models = zip(models, detectors, found, scale.zeros, strict=True)
        of_image = [said(*of_model, scale.ends, image.size) for of_model in of_models]
        shown.append(Shown(path, on_one_line(path.name), picture(image), of_image))
    return Judgement(shown, failed, scale)


def common_scale(detectors: Sequence[Detector], maps: Sequence[np.ndarray]) -> Scale:
    """The scale of the maps of some models. Cross-attention moves all values, so thresholds are laid on each other."""
    fitted = [detector.calibration for detector in detectors if detector.calibration is not None]
    thresholds = [found.map_threshold for found in fitted if found.map_threshold is not None]
    zeros, unit = [0.0] * len(detectors), "map value"
    if len(thresholds) == len(detectors):
        zeros, unit = thresholds, "map value less the model's threshold: from 0 on, a pixel belongs to a region"
    if len(fitted) == len(detectors):
        ranges = [
            (low - zero, high - zero)
            for (low, high), zero in zip((one.map_range for one in fitted), zeros, strict=True)
        ]
        where = "a model on images of training"
    else:
        ranges = [(float(values.min()), float(values.max())) for values in maps]
        where = "these maps"
    ends = min(low for low, _ in ranges), max(high for _, high in ranges)
    return Scale(zeros, ends, f"{unit}; ends: the extremes of {where}")


def said(
    role: str, detector: Detector, verdict: Verdict, zero: float, ends: tuple[float, float], size: tuple[int, int]
) -> Said:
    """What a page shows of a verdict, with its map, less `zero`, as a picture of `size`, width and height in px."""
    threshold = None if detector.calibration is None else detector.calibration.threshold
    drawn = coloured(verdict.map - zero, ends, MAP_COLOURS, size)
    return Said(role, detector.name, drawn, verdict.single_score, verdict.probability, threshold)


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy no larger than a page shows it."""
    small = image.copy()
    small.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    return small


def coloured(values: np.ndarray, ends: tuple[float, float], colours: str, size: tuple[int, int]) -> str:
    """A map [h, w] in the colours of Matplotlib's map of that name between two values, as a picture of `size`, px."""
    pixels = colormaps[colours](scaled(values, ends), bytes=True)[..., :3]
    return picture(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def picture(image: Image.Image) -> str:
    """A data URL, which needs no file on disk."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
