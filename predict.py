"""Score own images: no data set, no masks.

    python predict.py --ckpt ckpt/<run>/loop_3.pth --images DIR --class_name "metal bolt"

--images takes files, folders and patterns with * or **. Writes, for each image, a picture of its anomaly maps and the
maps as arrays, and predictions.csv. Several --ckpt (a base, a loop, a run folder) stand side by side.

In Python:

    from predict import Detector
    detector = Detector.load("ckpt/<run>/loop_3.pth", class_name="metal bolt")
    verdict = detector("bolt.png")    # verdict.score, .probability, .anomalous, .map
"""

import argparse
import csv
import glob
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.constants import BLUR, describe_class
from dataset.images import as_rgb, read_image
from dataset.layouts import IMAGE_SUFFIXES
from dataset.transforms import Transform
from forward_utils_cross_attention import ClassText, PromptBank, check_grid, predict
from model.adapter_cross_attention import CrossAttentionCLIP
from utils import arguments
from utils.calibration import Calibration
from utils.cli import run_script
from utils.evaluation import ModelBuilder, checkpoints_of, model_names
from utils.logs import progress
from utils.metrics import check_finite
from utils.pictures import file_name
from utils.plots import Example, Panel, draw_examples

logger = logging.getLogger("predict")

# Longer side of the image in pictures, px.
PICTURE_SIZE = 600


@dataclass(frozen=True)
class Verdict:
    """What a model says of one image.

    `score` in [0, 1] needs no other image; `detection_score` and `highest`, the highest value of `map` [S, S], are what
    it is made of. `probability` and `anomalous` are None where the checkpoint has no calibration.
    """

    score: float
    detection_score: float
    highest: float
    probability: float | None
    anomalous: bool | None
    map: np.ndarray


@dataclass(frozen=True)
class Detector:
    """A trained model for images of one thing."""

    name: str
    model: CrossAttentionCLIP
    text: ClassText
    domain: str
    calibration: Calibration | None
    precision: str = "fp32"

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
    ) -> "Detector":
        """From a loop file or the folder of a base; the rest as predict.py's flags of these names.

        Raises FileNotFoundError or ValueError that say what was expected.
        """
        if domain not in BLUR:
            raise ValueError(f"domain '{domain}': expected {' or '.join(BLUR)}.")
        args = argparse.Namespace(
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            precision=precision,
            clip_weights=Path(clip_weights) if clip_weights else None,
            model_name=model_name,
            img_size=img_size,
        )
        detectors = load_detectors([Path(ckpt)], class_name, domain, args)
        if len(detectors) > 1:
            raise ValueError(f"{ckpt}: a run of {len(detectors)} loops. Name one of its files.")
        return detectors[0]

    def __call__(self, image: str | Path | Image.Image) -> Verdict:
        """Judge an image, a file or an open one. Raises ValueError where a file is not readable as an image."""
        picture, name = (as_rgb(image), "the image") if isinstance(image, Image.Image) else (None, str(image))
        pixels, _ = Transform(self.model.backbone.img_size)(picture or read_image(Path(image)), None)
        (class_name,) = self.text.bank.index
        batch = pixels[None].to(self.model.backbone.device)
        found = predict(self.model, batch, [class_name], self.text, self.domain, self.precision)
        check_finite(found, [name])
        score, highest = found.scores.item(), found.maps.max().item()
        probability = anomalous = None
        if self.calibration is not None:
            probability = self.calibration.probabilities(np.array(score), np.array(highest)).item()
            anomalous = bool(self.calibration.decisions(probability))
        return Verdict(found.single.item(), score, highest, probability, anomalous, found.maps[0].cpu().numpy())


def load_detectors(paths: list[Path], class_name: str, domain: str, args: argparse.Namespace) -> list[Detector]:
    """Detectors of all checkpoints, on one backbone."""
    build = ModelBuilder(args)
    checkpoints = [checkpoint for path in paths for checkpoint in checkpoints_of(path)]
    models = [build(checkpoint) for checkpoint in checkpoints]
    check_grid(build.backbone.grid, domain)
    description, _ = describe_class("", class_name)
    bank = PromptBank(build.backbone, {class_name: description})
    return [
        Detector(name, model, ClassText(model, bank, fixed=True), domain, checkpoint.calibration, args.precision)
        for name, model, checkpoint in zip(model_names(checkpoints), models, checkpoints, strict=True)
    ]


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, nargs="+", required=True, help="loop files, run folders or base models")
    parser.add_argument("--images", nargs="+", required=True, help="files, folders (with all within) or patterns")
    parser.add_argument("--class_name", default="object", help="what the images show, in words CLIP knows")
    parser.add_argument("--domain", choices=tuple(BLUR), default=next(iter(BLUR)), help="of the images")
    parser.add_argument("--save_path", type=Path, default=Path("predictions"), help="folder for the results")
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    arguments.add_machine_arguments(parser)
    return parser.parse_args()


def find_images(given: list[str]) -> dict[Path, str]:
    """{image file: a name for its results}, from files, folders and patterns. Raises FileNotFoundError for nothing."""
    found: dict[Path, str] = {}
    taken = set()
    for text in given:
        path = Path(text)
        if path.is_file():
            files = [path]
        else:
            inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(text, recursive=True))
            files = sorted(file for file in inside if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise FileNotFoundError(f"--images {text}: no image there; files, folders and patterns are understood.")
        for file in dict.fromkeys(files):
            if file not in found:
                parts = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("").parts
                found[file] = _unused(file_name("_".join(parts)), taken)
    return found


def _unused(stem: str, taken: set[str]) -> str:
    """A name that no other image has, not even in other letters of case; it is added to `taken`."""
    name, number = stem, 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}__{number}"
    taken.add(name.casefold())
    return name


def judge_all(detectors: list[Detector], images: dict[Path, str], folder: Path) -> tuple[list[dict], dict[Path, str]]:
    """Rows of predictions.csv, and {image: what is wrong with it}; the maps are written as they come."""
    rows, failed = [], {}
    for path, stem in progress(images.items(), desc="images", unit="image"):
        try:
            image = read_image(path)
            verdicts = [detector(image) for detector in detectors]
        except ValueError as error:
            failed[path] = str(error)
            logger.error("error: %s", error)
            continue
        for detector, verdict in zip(detectors, verdicts, strict=True):
            file = folder / map_file(stem, detector)
            np.save(file, verdict.map)
            decision = None if verdict.anomalous is None else "anomalous" if verdict.anomalous else "normal"
            row = {"image": str(path), "model": detector.name, "single_score": verdict.score, "decision": decision}
            row |= {"probability": verdict.probability, "detection_score": verdict.detection_score}
            rows.append(
                row | {"highest_map_value": verdict.highest, "lowest_map_value": verdict.map.min(), "map": file.name}
            )
    return rows, failed


def map_file(stem: str, detector: Detector) -> str:
    """Name of the file with a model's map of an image."""
    return f"{stem}_{file_name(detector.name)}.npy"


def map_ranges(detectors: list[Detector], rows: list[dict]) -> tuple[list[tuple[float, float]], str]:
    """What each model's maps are scaled by in pictures, the same for every image, and what that is called."""
    if all(detector.calibration for detector in detectors):
        return [detector.calibration.map_range for detector in detectors], "a model's extremes on images of training"
    low, high = min(row["lowest_map_value"] for row in rows), max(row["highest_map_value"] for row in rows)
    return [(low, high)] * len(detectors), "the extremes of all images of this call"


def draw(
    path: Path, rows: list[dict], ranges: list[tuple[float, float]], scaled_by: str, folder: Path, stem: str
) -> None:
    """The picture of one image: it, and every model's map."""
    image = read_image(path)
    image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    panels = []
    for row, (low, high) in zip(rows, ranges, strict=True):
        caption = f"score {row['single_score']:.3f}"
        if row["decision"]:
            caption += f", p {row['probability']:.2f}: {row['decision']}"
        panels.append(Panel((np.load(folder / row["map"]) - low) / max(high - low, 1e-12), caption))
    example = Example(stem, np.asarray(image) / 255, None, panels)
    draw_examples([example], [row["model"] for row in rows], scaled_by, path.name, folder / f"{stem}.png")


def main() -> int:
    args = parse_arguments()
    images = find_images(args.images)
    detectors = load_detectors(args.ckpt, args.class_name, args.domain, args)
    silent = [detector.name for detector in detectors if detector.calibration is None]
    if silent:
        logger.warning(
            "No decisions from %s: a file without a calibration; loop files have one, loop_0.pth for the base.",
            ", ".join(silent),
        )
    args.save_path.mkdir(parents=True, exist_ok=True)
    rows, failed = judge_all(detectors, images, args.save_path)
    if rows:
        with open(args.save_path / "predictions.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(table(rows))
        ranges, scaled_by = map_ranges(detectors, rows)
        judged = [each for each in images.items() if each[0] not in failed]
        for number, (path, stem) in enumerate(progress(judged, desc="pictures", unit="image")):
            own = rows[number * len(detectors) : (number + 1) * len(detectors)]
            draw(path, own, ranges, scaled_by, args.save_path, stem)
        logger.info("Wrote predictions.csv, pictures and maps (.npy) to %s", args.save_path)
    if failed:
        logger.error("%d of %d images could not be judged: %s", len(failed), len(images), ", ".join(map(str, failed)))
    return 1 if failed else 0


def table(rows: list[dict]) -> str:
    """Image, model, score, probability and decision of each row."""
    width = max(len(row["image"]) for row in rows)
    names = max(len(row["model"]) for row in rows)
    lines = [f"{'image':{width}}  {'model':{names}}  score  probability  decision"]
    for row in rows:
        p = "n/a" if row["probability"] is None else f"{row['probability']:.3f}"
        score, decision = f"{row['single_score']:.3f}", row["decision"] or "n/a"
        lines.append(f"{row['image']:{width}}  {row['model']:{names}}  {score}  {p:>11}  {decision}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
