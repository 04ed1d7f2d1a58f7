"""Write a trained model as an ONNX file, which needs neither PyTorch nor this program.

    python export.py --ckpt ckpt/<run>/loop_3.pth --class_name "metal bolt" "metal nut" --out bolt.onnx
    python predict.py --ckpt bolt.onnx --class_name "metal bolt" --images DIR

In go images of the model's size, uint8 [B, S, S, 3], red first, and, where several classes are named, the number of
each image's class, int64 [B]; out come anomaly maps, scores, and by the checkpoint's calibration probabilities and
decisions. Prompts, threshold, names and hashes stand in the file's metadata. What is written is compared with PyTorch.
With --precision fp16 or --quantize int8 the file is smaller; what is lost is measured.
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import logging
from importlib.util import find_spec

import torch

from dataset.commands import add_data_root, path_argument, show
from dataset.constants import BLUR, class_prompts
from dataset.files import check_place
from dataset.prepare import prepare
from dataset.sets import open_dataset
from utils import arguments
from utils.checkpoints import Checkpoint, one_checkpoint
from utils.cli import run_script
from utils.exported import FORMAT, INSTALL, About
from utils.files import file_sha256, is_exported
from utils.judging import Detector, load_detectors
from utils.models import ModelLoader
from utils.options import at_least

logger = logging.getLogger("export")

PRECISIONS = ("fp32", "fp16")
# Where the loss of a smaller file is measured: a set that everyone has.
LOSS_DATA, LOSS_IMAGES = "demo_test", 10
# How much maps may differ from PyTorch's, in shares of their range.
MOST_DIFFERENCE = 1e-4


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--ckpt", type=path_argument, required=True, help="a loop file or a base model")
    parser.add_argument(
        "--class_name",
        type=arguments.class_argument,
        nargs="+",
        default=["object"],
        help="what the images show, in words CLIP knows; of several, each image is given the number of its own",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="the file, .onnx")
    parser.add_argument("--domain", choices=tuple(BLUR), default=next(iter(BLUR)), help="of the images")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the numbers in the graph")
    parser.add_argument("--quantize", choices=("int8",), help="products with weights in whole numbers of 8 bits")
    parser.add_argument(
        "--loss_images",
        type=at_least(0),
        default=LOSS_IMAGES,
        help=f"of each kind and class of {LOSS_DATA}, on which the loss of a smaller file is measured; 0 for none",
    )
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    group = parser.add_argument_group("places")
    arguments.add_weights_argument(group)
    add_data_root(group, links=False)
    args = parser.parse_args()
    if not is_exported(args.out):
        parser.error(f"--out {args.out}: expected a name that ends with .onnx")
    if args.quantize and args.precision != PRECISIONS[0]:
        parser.error(f"--quantize {args.quantize}: goes with --precision {PRECISIONS[0]} alone")
    if twice := [name for name in args.class_name if args.class_name.count(name) > 1]:
        parser.error(f"--class_name {twice[0]}: is named twice")
    return args


def check_installed() -> None:
    """Raise ValueError where a library that writes or runs ONNX files is missing."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ValueError(f"export.py needs {', '.join(missing)}. Install: {INSTALL}")


def load_model(args: argparse.Namespace) -> tuple[Checkpoint, Detector]:
    """The checkpoint of --ckpt, and its model with the prompts of the classes, on the CPU."""
    checkpoint = one_checkpoint(args.ckpt)
    loader = ModelLoader(torch.device("cpu"), args.clip_weights, arguments.model_flags(args))
    (detector,) = load_detectors([checkpoint], args.class_name, args.domain, loader, PRECISIONS[0])
    return checkpoint, detector


def about(checkpoint: Checkpoint, detector: Detector, exactness: str) -> About:
    """What is said of the file in its metadata."""
    described, backbone, fitted = detector.text.bank.descriptions, detector.model.backbone, detector.calibration
    path = checkpoint.path
    return {
        "format": FORMAT,
        "name": detector.name,
        "classes": list(described),
        "prompts": {name: class_prompts(description) for name, description in described.items()},
        "domain": detector.text.bank.domain,
        "img_size": backbone.img_size,
        "precision": exactness,
        "calibration": fitted,
        "threshold": None if fitted is None else fitted.threshold,
        "clip_sha256": backbone.sha256,
        "checkpoint": path.name,
        "checkpoint_sha256": {path.name: file_sha256(path)} if checkpoint.is_loop_file else checkpoint.base["sha256"],
    }


def main() -> int:
    args = parse_arguments()
    check_installed()
    # Here, because these need libraries that the rest of the program does not.
    from utils.exporting.files import check_out, write_graph
    from utils.exporting.graph import Judge, check_difference, to_graph
    from utils.exporting.reduced import REDUCED, loss_of

    check_place(args.out.parent, "--out")
    check_out(args.out)
    checkpoint, detector = load_model(args)
    exactness = args.quantize or args.precision
    judge = Judge(detector, detector.text.bank.descriptions, args.domain)
    logger.info("Tracing the model.")
    graph = to_graph(judge)
    if exactness in REDUCED:
        graph = REDUCED[exactness](graph)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    most = MOST_DIFFERENCE if exactness == PRECISIONS[0] else None
    files, difference = write_graph(
        graph, about(checkpoint, detector, exactness), args.out, lambda file: check_difference(judge, file, most)
    )
    for file in files:
        logger.info("Wrote %s, %.1f MB", file, file.stat().st_size / 1e6)
    show(
        f"opset {graph.opset_import[0].version}, valid by ONNX's checker; maps differ from PyTorch's by at most "
        f"{difference:.1e} of their range."
    )
    if exactness in REDUCED and args.loss_images:
        prepare(LOSS_DATA, args.data_root)
        show(loss_of(exactness, detector, open_dataset(LOSS_DATA, args.data_root), args.loss_images))
    return 0


if __name__ == "__main__":
    run_script(main, several=False)
