"""Test checkpoints beside the base they started from, on the same images.

    python test.py --ckpt ckpt/<run>/loop_3.pth --dataset MVTec

--ckpt takes loop files, run folders (all their loops) and base models; several at once. Prints a table per data set:
metrics, differences from the base with 95 % intervals, means over seeds. Writes them by class and by image beside each
checkpoint (CSV), and beside the last one as a whole (JSON and LaTeX). --pictures adds sheets of anomaly maps, --report
everything in one HTML file. --image_idx shows one image across the base and all loops, without metrics.
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from dataset.commands import name_argument, path_argument, show
from dataset.files import check_place
from dataset.layouts import known_good
from dataset.prepare import prepare
from dataset.records import digest
from dataset.sets import DataSet, open_all, open_dataset
from dataset.survey import surveyed, with_bits
from utils import arguments, checkpoints, processes
from utils.checkpoints import check_there
from utils.cli import run_script
from utils.judging import check_normal_images
from utils.models import ModelLoader, compile_models
from utils.options import MOST_SEED, add_flag, at_least
from utils.report.html import Chapter, write_report
from utils.report.pictures import draw_loops, draw_one, draw_sheets, picture_folder
from utils.report.tables import notes, text_table, write_json, write_latex, write_results
from utils.testing.bench import EVAL_BATCH, Batching, Bench
from utils.testing.bootstrap import RESAMPLES
from utils.testing.comparison import Comparison
from utils.testing.contenders import load_contenders
from utils.testing.measure import measure

logger = logging.getLogger("test")

# Images of a kind per class in the sheets of a report.
REPORT_PICTURES = 3


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument(
        "--ckpt", type=path_argument, nargs="+", default=[], help="loop files, run folders or base models"
    )
    parser.add_argument(
        "--control",
        type=path_argument,
        nargs="+",
        default=[],
        help="runs to compare with, loop by loop, beside the base: longer training without the extension, one per seed",
    )
    parser.add_argument(
        "--dataset",
        type=name_argument,
        nargs="+",
        default=["MVTec"],
        help="data sets: known names, folders under --data_root, or paths of folders and .jsonl files",
    )
    parser.add_argument(
        "--save_path",
        type=path_argument,
        help="folder for the results, one in it for each run; without it they go beside the checkpoints",
    )
    arguments.add_own_data_arguments(parser)
    add_flag(parser, "reduced_jpeg", bool, arguments.REDUCED_JPEG, False)
    parser.add_argument("--normal_images", type=path_argument, help=arguments.NORMAL_IMAGES)
    parser.add_argument(
        "--batch_size",
        type=at_least(1, 65_536),
        default=EVAL_BATCH,
        help="images per forward; results do not depend on it",
    )
    parser.add_argument(
        "--resamples", type=at_least(1, 100_000), default=RESAMPLES, help="of the images, for the intervals"
    )
    parser.add_argument("--seed", type=at_least(0, MOST_SEED), default=0, help="of the resamples")
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--pictures",
        type=at_least(0, 100),
        default=0,
        help="anomalous and normal images per class in the sheets of anomaly maps, of the last checkpoint beside its "
        "base; 0 for none",
    )
    group.add_argument(
        "--report", action="store_true", help="write report_<data sets>.html, with pictures, beside the last checkpoint"
    )
    group.add_argument("--list_images", action="store_true", help="print the images with their numbers, and stop")
    group.add_argument(
        "--image_idx",
        type=at_least(0),
        help="draw this image of --class_name (a class of the data set, needed where it has several) across the base "
        "and the loops of --ckpt, and stop",
    )
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    arguments.add_compile_argument(arguments.add_run_arguments(parser))
    return parser.parse_args()


def open_data_sets(args: argparse.Namespace) -> list[DataSet]:
    """The data sets of --dataset; where one image is asked for, --class_name may be one of its classes."""
    with processes.first_ahead():
        for name in args.dataset:
            prepare(name, args.data_root, args.follow_links)
        return open_prepared(args)


def open_prepared(args: argparse.Namespace) -> list[DataSet]:
    """The same, of data sets that lack nothing."""
    named = {"domain": args.domain, "class_name": args.class_name}
    named |= {"follow_links": args.follow_links, "skip_broken": args.skip_broken}
    if args.class_name is None or (args.image_idx is None and not args.list_images):
        return open_all(args.dataset, args.data_root, **named)
    data_sets = open_all(args.dataset, args.data_root, **named | {"class_name": None})
    for number, data in enumerate(data_sets):
        if args.class_name not in data.descriptions:
            if len(data.descriptions) > 1:
                raise ValueError(f"--class_name {args.class_name}: {data.name} has {', '.join(data.descriptions)}.")
            data_sets[number] = open_dataset(args.dataset[number], args.data_root, **named)
    return data_sets


def normal_images_of(args: argparse.Namespace, data: DataSet) -> dict[str, list[Path]] | None:
    """{class: images} of --normal_images for a data set."""
    if args.normal_images is None:
        return None
    return known_good(args.normal_images, list(data.descriptions), [data.folder / r.image_path for r in data.records])


def class_of_image(data: DataSet, class_name: str | None, index: int) -> str:
    """The class of --image_idx. Raises ValueError where it is not said, or has no such image."""
    if class_name is None and len(data.descriptions) > 1:
        raise ValueError(f"--image_idx {index}: say of which --class_name: {', '.join(data.descriptions)}.")
    class_name = class_name or next(iter(data.descriptions))
    count = len(data.of_class(class_name))
    if index >= count:
        raise ValueError(f"--image_idx {index}: {class_name} has images 0 to {count - 1}.")
    return class_name


def list_images(data: DataSet, class_name: str | None) -> str:
    """Class, number, label and path of each image."""
    lines = [f"{data.name}: class, --image_idx, label, image"]
    for name in [class_name] if class_name else data.descriptions:
        for number, record in enumerate(data.of_class(name)):
            lines.append(f"{name}  {number:5}  {'anomalous' if record.label else 'normal':9}  {record.image_path}")
    return "\n".join(lines)


def write(comparison: Comparison) -> None:
    """Print the table of a comparison and write its files, beside the checkpoints and the last of them."""
    data, folder = comparison.data, comparison.subject.contender.folder
    show(f"\n{data.name}: {len(data.records)} images, in percent", text_table(comparison), *notes(comparison))
    files = [path for results in comparison.results for path in write_results(results)]
    files.append(write_json(comparison, folder / f"comparison_{data.name}.json"))
    files.append(write_latex(comparison, folder / f"comparison_{data.name}.tex"))
    logger.info("Wrote %s", ", ".join(map(str, files)))


def draw(comparison: Comparison, count: int) -> tuple[list[Path], Path | None]:
    """Draw sheets of `count` images of a kind, and metrics over loops."""
    sheets, curves = draw_sheets(comparison, count), draw_loops(comparison)
    logger.info("Pictures: %s", picture_folder(comparison.bench, comparison.subject.contender))
    return sheets, curves


def main() -> None:
    args = parse_arguments()
    if not args.ckpt and not args.list_images:
        raise ValueError("--ckpt is needed: loop files, run folders or base models.")
    for path in [*args.ckpt, *args.control]:
        check_there(path)
    data_sets = open_data_sets(args)
    if args.list_images:
        for data in data_sets:
            show(list_images(data, args.class_name))
        return
    if args.image_idx is not None:
        classes = [class_of_image(data, args.class_name, args.image_idx) for data in data_sets]
    machine = arguments.machine_of(args)
    loader = ModelLoader(machine.device, machine.clip_weights, arguments.model_flags(args))
    contenders = load_contenders(args.ckpt, args.control, loader, args.save_path)
    if args.compile:
        compile_models(contender.model for contender in contenders)
    for contender in contenders:
        check_place(contender.folder, "--save_path" if args.save_path else "results beside --ckpt (see --save_path):")
    if args.image_idx is None:
        data_sets = processes.once_here(lambda: [surveyed(data, args.bits, machine.skip_broken) for data in data_sets])
    else:  # which leaves all others alone, but for how bright they are
        data_sets = [replace(d, records=with_bits(d.folder, d.records, args.bits)) for d in data_sets]
    arguments.check_same(
        args,
        lambda: {
            "CLIP weights": loader.backbone.sha256,
            **{f"images of {data.name}": digest(data.records) for data in data_sets},
            **{contender.name: checkpoints.model_sha256(contender.model) for contender in contenders},
        },
    )
    if args.normal_images:
        check_normal_images(contender.model for contender in contenders)
    how = args.precision, args.reduced_jpeg, machine.resized_images
    batching = Batching(args.batch_size, machine.num_workers, *how)
    benches = [Bench(data, loader.backbone, batching, normal_images_of(args, data)) for data in data_sets]
    if args.image_idx is not None:
        if not processes.is_first():
            return
        for bench, class_name in zip(benches, classes, strict=True):
            logger.info("Wrote %s", ", ".join(map(str, draw_one(bench, contenders, class_name, args.image_idx))))
        return
    chapters = []
    for bench in benches:
        comparison = measure(bench, contenders, args.resamples, args.seed)
        if comparison is None:  # another process writes it
            continue
        write(comparison)
        count = args.pictures or (REPORT_PICTURES if args.report else 0)
        sheets, curves = draw(comparison, count) if count else ([], None)
        if args.report:
            class_name = comparison.classes[0]
            (index, *_) = comparison.subject.choose(class_name, 1)
            one_image = draw_one(bench, contenders, class_name, index)
            chapters.append(Chapter(comparison, sheets, curves, one_image))
    if chapters:
        logger.info("Report: %s", write_report(chapters))


if __name__ == "__main__":
    run_script(main)
