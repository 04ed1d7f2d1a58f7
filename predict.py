"""Score own images: no data set, no masks.

    python predict.py --ckpt ckpt/<run>/loop_3.pth --images DIR --class_name "metal bolt"
    python predict.py --ckpt ckpt/<run>/loop_3.pth --watch DIR --class_name "metal bolt"
    python predict.py --ckpt bolt.onnx --images DIR

--images takes files, folders (with all within) and patterns with * or **. Writes, for each image, a picture of its
anomaly maps and the maps as arrays, and predictions.csv; with --regions also where the defects are. --watch judges the
images of a folder as they come, until it is stopped, and prints a line of JSON for each; it writes no files. Several
--ckpt (a base, a loop, a run folder) stand side by side. An exported model (see export.py) needs no PyTorch.

In Python:

    from predict import Detector
    detector = Detector.load("ckpt/<run>/loop_3.pth", class_name="metal bolt")
    verdict = detector("bolt.png")    # verdict.single_score, .probability, .anomalous, .map, .regions
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.commands import name_argument, path_argument, show
from dataset.constants import BLUR
from dataset.files import check_place
from dataset.images import take_pixels
from dataset.layouts import known_good
from utils import arguments, processes
from utils.cli import run_script
from utils.errors import FULL
from utils.exported import load_exported
from utils.files import is_exported
from utils.inference.images import find_images, remark
from utils.inference.results import (
    REGIONS,
    Record,
    check_folder,
    coco_files,
    draw,
    map_files,
    plain,
    record_of,
    table,
    write_map,
    write_regions,
    write_table,
)
from utils.inference.watch import watch
from utils.logs import progress
from utils.options import add_flag, at_least, finite
from utils.signals import StopSignal
from utils.verdicts import ImageJudge, calibrated_extremes, verdicts_on

logger = logging.getLogger("predict")


def __getattr__(name: str) -> Any:
    """`Detector`, imported where it is asked for: who runs an exported model has no PyTorch."""
    if name == "Detector":
        from utils.judging import Detector

        return Detector
    raise AttributeError(f"module 'predict' has no attribute '{name}'")


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument(
        "--ckpt",
        type=path_argument,
        nargs="+",
        required=True,
        help="loop files, run folders, base models or exported models (.onnx)",
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        "--images",
        type=name_argument,
        nargs="+",
        help="files, folders (with all within but hidden ones) or patterns",
    )
    images.add_argument("--watch", type=path_argument, help="folder whose images are judged as they come")
    parser.add_argument(
        "--class_name",
        type=arguments.class_argument,
        help="what the images show, in words CLIP knows [object; of an exported model its only one]",
    )
    parser.add_argument(
        "--domain", choices=tuple(BLUR), help=f"of the images [{next(iter(BLUR))}; of an exported model its own]"
    )
    parser.add_argument("--bits", type=at_least(8, 16), default=16, help=arguments.FEWER_BITS)
    add_flag(parser, "reduced_jpeg", bool, arguments.REDUCED_JPEG, False)
    parser.add_argument("--normal_images", type=path_argument, help=arguments.NORMAL_IMAGES)
    parser.add_argument(
        "--regions",
        action="store_true",
        help=f"write the parts of each image above a threshold to {REGIONS} and, in COCO's format, to "
        "coco_<model>.json, and draw them",
    )
    parser.add_argument("--map_threshold", type=finite, help="of regions, in values of the map [the checkpoint's]")
    parser.add_argument("--save_path", type=path_argument, help="folder for the results [predictions]")
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    arguments.add_compile_argument(arguments.add_machine_arguments(parser))
    return parser.parse_args()


def load_judges(args: argparse.Namespace, images: Sequence[Path]) -> list[ImageJudge]:
    """The models of --ckpt: trained ones, then exported ones, whose class and domain the others take."""
    paths = [path for path in args.ckpt if is_exported(path)]
    trained = [path for path in args.ckpt if path not in paths]
    reading = args.bits, args.reduced_jpeg, args.map_threshold
    take_pixels(args.max_pixels)
    exported = load_exported(paths, args.class_name, args.domain, args.device, args.threads, *reading)
    for name, values in (
        ("class_name", {judge.class_name for judge in exported}),
        ("domain", {judge.about["domain"] for judge in exported}),
    ):
        if len(values) > 1:
            raise ValueError(
                f"--ckpt: files of more than one {name}: {', '.join(sorted(values))}. Judge by each alone."
            )
        if values:
            setattr(args, name, values.pop())
    if not trained:
        arguments.refuse_of_exported(args)
        logger.info("The prompts say '%s'.", args.class_name)
    return [*(load_trained(args, trained, images) if trained else []), *exported]


def load_trained(args: argparse.Namespace, paths: list[Path], images: Sequence[Path]) -> Sequence[ImageJudge]:
    """The models of checkpoints, on PyTorch."""
    # Here, because exported models alone need no PyTorch.
    from utils import checkpoints
    from utils.judging import check_normal_images, load_detectors
    from utils.machine import device_of
    from utils.models import ModelLoader, compile_models

    arguments.take_machine(args)
    for path in paths:
        checkpoints.check_there(path)
    loader = ModelLoader(device_of(args.device), args.clip_weights, arguments.model_flags(args))
    class_name, domain = args.class_name or "object", args.domain or next(iter(BLUR))
    reading = args.bits, args.reduced_jpeg, args.map_threshold
    detectors = load_detectors(
        checkpoints.all_checkpoints(paths), [class_name], domain, loader, args.precision, *reading
    )
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
        normal = known_good(args.normal_images, [class_name], list(images))
        check_normal_images(detector.model for detector in detectors)
        detectors = [detector.seeing(normal) for detector in detectors]
    logger.info("The prompts say '%s' (--class_name).", class_name)
    return detectors


def remark_on_models(args: argparse.Namespace, judges: Sequence[ImageJudge]) -> None:
    """Say what the models do not know. Raises ValueError where regions are asked for that none can tell."""
    if silent := [judge.name for judge in judges if judge.calibration is None]:
        logger.warning(
            "No decisions from %s: a file without a calibration; loop files have one, loop_0.pth for the base.",
            ", ".join(silent),
        )
    blind = [judge.name for judge in judges if judge.region_threshold is None]
    if args.regions and blind:
        raise ValueError(
            f"--regions: {', '.join(blind)}: a file without a threshold for maps. Newer loop files have one where "
            "their training images have masks; or give --map_threshold, in values of the map."
        )


def judge_all(
    judges: Sequence[ImageJudge],
    images: dict[Path, str],
    maps: dict[tuple[str, str], str],
    folder: Path,
    records: list[Record],
    failed: dict[Path, str],
    with_regions: bool,
) -> None:
    """Add to records and to {image: what is wrong with it}; the maps are written as they come.

    Where there are several processes, each judges the images whose turn is its own.
    """
    turns = list(processes.own_turns(images.items()))
    for path, stem in progress(turns, desc=f"images{processes.share()}", unit="image"):
        try:
            verdicts = verdicts_on(path, judges)
            for name, verdict in verdicts.items():
                write_map(folder / maps[stem, name], verdict.map)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # and so would all that follow
            failed[path] = str(error)
            logger.error("error: %s", error)
            continue
        records += [record_of(path, name, found, maps[stem, name], with_regions) for name, found in verdicts.items()]


def bring_together(
    records: list[Record], failed: dict[Path, str], images: dict[Path, str]
) -> tuple[list[Record], dict[Path, str]]:
    """What all processes judged, and could not, in the order of the images."""
    order = {str(path): number for number, path in enumerate(images)}
    parts = processes.for_all((records, failed))
    records = sorted((record for own, _ in parts for record in own), key=lambda record: order[record["image"]])
    found = {path: reason for _, own in parts for path, reason in own.items()}
    return records, {path: found[path] for path in images if path in found}


def draw_all(
    judges: Sequence[ImageJudge],
    records: list[Record],
    judged: list[tuple[Path, str]],
    folder: Path,
    bits: int,
) -> None:
    """The pictures of judged images, {file: name of its results} in the order of their records."""
    seen = min(record["lowest_map_value"] for record in records), max(record["highest_map_value"] for record in records)
    extremes, scaled_by = calibrated_extremes(judges, seen, "all images of this call")
    own_turns = list(processes.own_turns(enumerate(judged)))
    for number, (_, stem) in progress(own_turns, desc=f"pictures{processes.share()}", unit="image"):
        of_image = records[number * len(judges) : (number + 1) * len(judges)]
        draw(of_image, extremes, scaled_by, folder, stem, bits)
    processes.wait()  # one that is gone has not drawn its own


def judge_folder(args: argparse.Namespace) -> int:
    """Judge all of --images, and write what was found."""
    if args.map_threshold is not None and not args.regions:
        raise ValueError("--map_threshold: says where regions begin. Give --regions too, or leave it out.")
    folder = args.save_path or Path("predictions")
    check_place(folder, "--save_path")
    images = find_images(args.images, folder)
    judges = load_judges(args, list(images))
    remark_on_models(args, judges)
    models = [judge.name for judge in judges]
    maps = map_files(images, models)
    if processes.is_first():
        own = [REGIONS, *coco_files(models).values()]
        check_folder(folder, [*(f"{stem}.png" for stem in images.values()), *maps.values(), *own], images)
        folder.mkdir(parents=True, exist_ok=True)
        for name in own:  # of an earlier call
            (folder / name).unlink(missing_ok=True)
        write_table(folder, [])  # which tells from now on whose folder it is
    processes.wait()
    records: list[Record] = []
    failed: dict[Path, str] = {}
    try:
        judge_all(judges, images, maps, folder, records, failed, args.regions)
        records, failed = bring_together(records, failed, images)
    finally:  # also what was judged before a signal, or before the disk was full
        if processes.is_first():
            write_table(folder, records)
            if args.regions:
                write_regions(folder, records, models)
    if records:
        judged = [(path, stem) for path, stem in images.items() if path not in failed]
        remark([path for path, _ in judged], args.bits)
        show(table(records))
        draw_all(judges, records, judged, folder, args.bits)
        what = "predictions.csv, regions, pictures" if args.regions else "predictions.csv, pictures"
        logger.info("Wrote %s and maps (.npy) to %s", what, folder)
    if failed and processes.is_first():
        logger.error("%d of %d images could not be judged: %s", len(failed), len(images), ", ".join(map(str, failed)))
    return 1 if failed else 0


def judge_arrivals(args: argparse.Namespace) -> int:
    """Judge images of --watch as they come, until a signal; a line of JSON for each and each model."""
    for flag in ("save_path", "regions"):
        if getattr(args, flag):
            raise ValueError(f"--{flag}: --watch writes no files, and its lines hold the regions. Leave the flag out.")
    if processes.count() > 1:
        raise ValueError("--watch: works in one process. Start it without torchrun.")
    if not args.watch.is_dir():
        raise FileNotFoundError(f"--watch {args.watch}: no such folder, as seen from {Path.cwd()}.")
    judges = load_judges(args, [])
    remark_on_models(args, judges)
    judged, failed = 0, 0

    def say(path: Path, last: bool) -> bool:
        nonlocal judged, failed
        try:
            found = verdicts_on(path, judges)
            lines = [plain(record_of(path, name, verdict, None, True)) for name, verdict in found.items()]
            if not judged:
                remark([path], args.bits)
        except (ValueError, OSError) as error:
            if not last:
                return False
            failed += 1
            lines = [{"image": str(path), "error": str(error)}]
        else:
            judged += 1
        for line in lines:
            print(json.dumps(line), flush=True)
        return True

    with StopSignal() as stop:
        logger.info("Watching %s; Ctrl-C ends it.", args.watch)
        watch(args.watch, say, lambda: stop.received is not None)
    logger.info("Judged %d images; %d could not be.", judged, failed)
    return 1 if failed else 0


def main() -> int:
    args = parse_arguments()
    return judge_arrivals(args) if args.watch else judge_folder(args)


if __name__ == "__main__":
    run_script(main)
