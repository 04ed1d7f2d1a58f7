"""Score own images: no data set, no masks.

    python predict.py --ckpt ckpt/<run>/loop_3.pth --images DIR --class_name "metal bolt"

--images takes files, folders (with all within) and patterns with * or **. Writes, for each image, a picture of its
anomaly maps and the maps as arrays, and predictions.csv. Several --ckpt (a base, a loop, a run folder) stand side by
side.

In Python:

    from predict import Detector
    detector = Detector.load("ckpt/<run>/loop_3.pth", class_name="metal bolt")
    verdict = detector("bolt.png")    # verdict.single_score, .probability, .anomalous, .map
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import glob
import io
import logging
import os
from pathlib import Path
from textwrap import shorten

import numpy as np

from dataset.commands import name_argument, path_argument, show
from dataset.constants import BLUR
from dataset.files import check_place, replacing
from dataset.images import IMAGE_SUFFIXES, is_image, pages, read_image
from dataset.layouts import known_good
from dataset.survey import found_depth, pages_words
from dataset.words import on_one_line
from utils import arguments, checkpoints, processes
from utils.checkpoints import check_there
from utils.cli import run_script
from utils.errors import FULL
from utils.files import unused_name, write_csv
from utils.judging import (
    Detector,
    calibrated_extremes,
    caption,
    check_normal_images,
    decision_word,
    load_detectors,
    scaled,
)
from utils.logs import progress
from utils.machine import device_of
from utils.models import ModelLoader, compile_models
from utils.options import add_flag, at_least
from utils.report.plots import Example, Panel, draw_examples

__all__ = ["Detector"]

logger = logging.getLogger("predict")

# Longer side of the image in pictures, px.
PICTURE_SIZE = 600
# Columns of the printed table that the path of an image takes.
WIDEST = 80
TABLE = "predictions.csv"
COLUMNS = (
    *("image", "model", "single_score", "decision", "probability"),
    *("detection_score", "highest_map_value", "lowest_map_value", "map"),
)


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument(
        "--ckpt", type=path_argument, nargs="+", required=True, help="loop files, run folders or base models"
    )
    parser.add_argument(
        "--images",
        type=name_argument,
        nargs="+",
        required=True,
        help="files, folders (with all within but hidden ones) or patterns",
    )
    parser.add_argument(
        "--class_name",
        type=arguments.class_argument,
        default="object",
        help="what the images show, in words CLIP knows",
    )
    parser.add_argument("--domain", choices=tuple(BLUR), default=next(iter(BLUR)), help="of the images")
    parser.add_argument("--bits", type=at_least(8, 16), default=16, help=arguments.FEWER_BITS)
    add_flag(parser, "reduced_jpeg", bool, arguments.REDUCED_JPEG, False)
    parser.add_argument("--normal_images", type=path_argument, help=arguments.NORMAL_IMAGES)
    parser.add_argument("--save_path", type=path_argument, default=Path("predictions"), help="folder for the results")
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    arguments.add_compile_argument(arguments.add_machine_arguments(parser))
    return parser.parse_args()


def find_images(given: list[str], results: Path) -> dict[Path, str]:
    """{image file: a name for its results}, from files, folders and patterns.

    What lies in the folder of `results` is taken where its file is named, and not where a folder or a pattern holds it.
    Raises FileNotFoundError for nothing, ValueError where `results` is one of the folders.
    """
    found: dict[Path, str] = {}
    taken: set[str] = set()
    passed_over: list[Path] = []
    own = results.resolve()
    for text in given:
        path = Path(text)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            if path.resolve() == own:
                raise ValueError(
                    f"--save_path {results}: is the folder of --images, where the next call would judge the pictures "
                    "of this one. Choose another folder; it may lie within."
                )
            files, others = images_below(path, own)
            passed_over += others
        else:
            inside = map(Path, glob.glob(text, recursive=True))
            files = sorted(
                file for file in inside if is_image(file) and file.is_file() and own not in file.resolve().parents
            )
        if not files:
            raise FileNotFoundError(
                f"--images {text}: no image there. Files, folders and patterns are understood; of folders and patterns "
                f"{', '.join(IMAGE_SUFFIXES)} are read, but nothing in {results}, where the results go."
            )
        for file in dict.fromkeys(files):
            if file not in found:
                parts = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("").parts
                found[file] = unused_name("_".join(parts), taken)
    if passed_over:
        names = shorten(", ".join(map(str, passed_over)), 200, placeholder=" ...")
        logger.warning("%d files in folders are no images by their names, or lead nowhere: %s", len(passed_over), names)
    return found


def images_below(folder: Path, left_out: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder and in those within it, links to folders among them, and the files that are none.

    Hidden files, and those in `left_out`, are neither.
    """
    found, others, seen = list[Path](), list[Path](), set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or real == str(left_out):  # a link may lead back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(place, name) for name in files if not name.startswith(".")):
            (found if is_image(file) and file.is_file() else others).append(file)
    return sorted(found), sorted(others)


def map_files(images: dict[Path, str], models: list[str]) -> dict[tuple[str, str], str]:
    """{(name of an image's results, model): file of the map}, no two of which are one file on any system."""
    taken: set[str] = set()
    return {
        (stem, model): f"{unused_name(f'{stem}_{model}', taken)}.npy" for stem in images.values() for model in models
    }


def check_folder(folder: Path, files: list[str], images: dict[Path, str]) -> None:
    """Raise ValueError where one of `files` would take the place of an image, or of anything but earlier results."""
    table, own = folder / TABLE, False
    if table.is_file():
        with open(table, encoding="utf-8", errors="replace") as lines:
            own = lines.readline().strip() == ",".join(COLUMNS)
    inputs = {(status.st_dev, status.st_ino) for status in (path.stat() for path in images)}
    for path in (folder / name for name in [TABLE, *files]):
        if path.exists() and (not own or (path.stat().st_dev, path.stat().st_ino) in inputs):
            raise ValueError(
                f"--save_path {folder}: {path.name} is there already, and is no result of predict.py that may be "
                "replaced. Choose another folder, a new one for instance."
            )


def remark(images: list[Path], bits: int) -> None:
    """Say what may not be meant: files of several pages, and images of 16 bits that are all dark."""
    if several := [path for path in images if pages(path) > 1]:
        logger.warning("%s", pages_words(several))
    depth = found_depth(images)
    if depth is not None and depth.usual < bits:
        logger.warning(
            "Images of 16 bits have values up to %d, and are read as of %d bits, so they are dark. If their camera has "
            "%d, give --bits %d.",
            depth.highest,
            bits,
            depth.usual,
            depth.usual,
        )


def judge_all(
    detectors: list[Detector],
    images: dict[Path, str],
    maps: dict[tuple[str, str], str],
    folder: Path,
    rows: list[dict],
    failed: dict[Path, str],
) -> None:
    """Add to rows of predictions.csv and to {image: what is wrong with it}; the maps are written as they come.

    Where there are several processes, each judges the images whose turn is its own.
    """
    turns = list(processes.own_turns(images.items()))
    for path, stem in progress(turns, desc=f"images{processes.share()}", unit="image"):
        try:
            image = detectors[0].read(path)
            verdicts = [detector(image) for detector in detectors]
            for detector, verdict in zip(detectors, verdicts, strict=True):
                content = io.BytesIO()  # NumPy's own errors of writing do not say that a disk is full
                np.save(content, verdict.map)
                with replacing(folder / maps[stem, detector.name]) as file:
                    file.write(content.getbuffer())
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # and so would all that follow
            failed[path] = str(error)
            logger.error("error: %s", error)
            continue
        for detector, verdict in zip(detectors, verdicts, strict=True):
            name = maps[stem, detector.name]
            decision = None if verdict.anomalous is None else decision_word(verdict.anomalous)
            values = [str(path), detector.name, verdict.single_score, decision, verdict.probability]
            values += [verdict.detection_score, verdict.highest, verdict.map.min(), name]
            rows.append(dict(zip(COLUMNS, values, strict=True)))


def bring_together(
    rows: list[dict], failed: dict[Path, str], images: dict[Path, str]
) -> tuple[list[dict], dict[Path, str]]:
    """What all processes judged, and could not, in the order of the images."""
    order = {str(path): number for number, path in enumerate(images)}
    parts = processes.for_all((rows, failed))
    rows = sorted((row for own, _ in parts for row in own), key=lambda row: order[row["image"]])
    found = {path: reason for _, own in parts for path, reason in own.items()}
    return rows, {path: found[path] for path in images if path in found}


def draw(
    path: Path,
    rows: list[dict],
    extremes: list[tuple[float, float]],
    scaled_by: str,
    folder: Path,
    stem: str,
    bits: int,
) -> None:
    """The picture of one image: it, and every model's map."""
    image = read_image(path, bits)
    image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    panels = []
    for row, ends in zip(rows, extremes, strict=True):
        anomalous = None if row["decision"] is None else row["decision"] == decision_word(True)
        words = caption("single-image", row["single_score"], row["probability"], anomalous)
        panels.append(Panel(scaled(np.load(folder / row["map"]), ends), words))
    example = Example(stem, np.asarray(image) / 255, None, panels)
    draw_examples([example], [row["model"] for row in rows], scaled_by, path.name, folder / f"{stem}.png")


def table(rows: list[dict]) -> str:
    """Image, model, single-image score, probability and decision of each row."""
    names_of_images = [on_one_line(row["image"]) for row in rows]
    names_of_images = [name if len(name) <= WIDEST else f"...{name[3 - WIDEST :]}" for name in names_of_images]
    width = max(map(len, names_of_images))
    names = max(len(row["model"]) for row in rows)
    lines = [f"{'image':{width}}  {'model':{names}}  single-image score  probability  decision"]
    for row, image in zip(rows, names_of_images, strict=True):
        p = "n/a" if row["probability"] is None else f"{row['probability']:.3f}"
        score, decision = f"{row['single_score']:.3f}", row["decision"] or decision_word(None)
        lines.append(f"{image:{width}}  {row['model']:{names}}  {score:>18}  {p:>11}  {decision}")
    return "\n".join(lines)


def main() -> int:
    args = parse_arguments()
    arguments.take_machine(args)
    for path in args.ckpt:
        check_there(path)
    check_place(args.save_path, "--save_path")
    images = find_images(args.images, args.save_path)
    loader = ModelLoader(device_of(args.device), args.clip_weights, arguments.model_flags(args))
    named = args.class_name, args.domain
    detectors = load_detectors(args.ckpt, *named, loader, args.precision, args.bits, args.reduced_jpeg)
    if args.compile:
        compile_models(detector.model for detector in detectors)
    arguments.check_same(
        args,
        lambda: {
            "CLIP weights": loader.backbone.sha256,
            "images": list(map(str, images)),
            **{detector.name: checkpoints.model_sha256(detector.model) for detector in detectors},
        },
    )
    if args.normal_images:
        normal = known_good(args.normal_images, [args.class_name], list(images))
        check_normal_images(detector.model for detector in detectors)
        detectors = [detector.seeing(normal) for detector in detectors]
    logger.info("The prompts say '%s' (--class_name).", args.class_name)
    silent = [detector.name for detector in detectors if detector.calibration is None]
    if silent:
        logger.warning(
            "No decisions from %s: a file without a calibration; loop files have one, loop_0.pth for the base.",
            ", ".join(silent),
        )
    maps = map_files(images, [detector.name for detector in detectors])
    if processes.is_first():
        check_folder(args.save_path, [*(f"{stem}.png" for stem in images.values()), *maps.values()], images)
        args.save_path.mkdir(parents=True, exist_ok=True)
        write_csv(args.save_path / TABLE, [], COLUMNS)  # which tells from now on whose folder it is
    processes.wait()
    rows: list[dict] = []
    failed: dict[Path, str] = {}
    try:
        judge_all(detectors, images, maps, args.save_path, rows, failed)
        rows, failed = bring_together(rows, failed, images)
    finally:  # also what was judged before a signal, or before the disk was full
        if processes.is_first():
            write_csv(args.save_path / TABLE, rows, COLUMNS)
    if rows:
        remark([path for path in images if path not in failed], args.bits)
        show(table(rows))
        seen = min(row["lowest_map_value"] for row in rows), max(row["highest_map_value"] for row in rows)
        extremes, scaled_by = calibrated_extremes(detectors, seen, "all images of this call")
        judged = [(path, stem) for path, stem in images.items() if path not in failed]
        own_turns = list(processes.own_turns(enumerate(judged)))
        for number, (path, stem) in progress(own_turns, desc=f"pictures{processes.share()}", unit="image"):
            own = rows[number * len(detectors) : (number + 1) * len(detectors)]
            draw(path, own, extremes, scaled_by, args.save_path, stem, args.bits)
        processes.wait()  # one that is gone has not drawn its own
        logger.info("Wrote predictions.csv, pictures and maps (.npy) to %s", args.save_path)
    if failed and processes.is_first():
        logger.error("%d of %d images could not be judged: %s", len(failed), len(images), ", ".join(map(str, failed)))
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
