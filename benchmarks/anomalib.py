"""Metrics of one model by this program and by anomalib's Engine, side by side, on the same images.

    python -m benchmarks.anomalib --ckpt ckpt/demo_feedback/loop_3.pth --data data/demo_test

The data lie as MVTec's. Means over the classes, in percent. anomalib runs the model three times: "as given" without its
post-processor; "torchvision" so too, with images and masks resized as for its other models; "default" as users run it,
with the post-processor. docs/anomalib.md says where the differences come from.
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torchvision.transforms import InterpolationMode, v2

from dataset.commands import path_argument, show
from dataset.sets import DataSet, open_dataset
from utils.checkpoints import check_there, one_checkpoint
from utils.cli import run_script
from utils.machine import device_of
from utils.models import ModelLoader
from utils.testing.bench import EVAL_BATCH, Batching, Bench
from utils.testing.contenders import Contender
from utils.testing.measure import scores_by_class

# {metric: (what it is, what anomalib calls it)}; anomalib has no image score that takes a whole class.
COMPARED = {
    "pixel_auroc": ("pixel AUROC", "pixel_AUROC"),
    "pixel_f1": ("pixel F1-max", "pixel_F1Max"),
    "pixel_aupro": ("AUPRO", "pixel_AUPRO"),
    "single_auroc": ("image AUROC, single-image score", "image_AUROC"),
    "single_f1": ("image F1-max, single-image score", "image_F1Max"),
    "image_auroc": ("image AUROC, published score", None),
    "image_f1": ("image F1-max, published score", None),
}
OWN, GIVEN, RESIZED, DEFAULT = "this program", "as given", "torchvision", "default"
REASONS = f"""
In brackets: the largest difference of a class from {OWN}, whose own pixel metrics are within 0.01 of exact ones.
{GIVEN}: the same maps, scores and masks. torchmetrics' AUROC takes the sigmoid of maps, where values above 17 tie.
{RESIZED}: its bicubic neither rounds to 8 bits nor cuts off at 0 and 1; its masks lie up to half a pixel off.
{DEFAULT}: the post-processor cuts off what lies further from its threshold than half the range, which makes ties.
n/a: the published score takes a whole class; anomalib scores a batch at a time."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=path_argument, required=True, help="a loop file or the folder of a base")
    parser.add_argument("--data", type=path_argument, required=True, help="a data set in a folder, which lies as MVTec")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="some of its classes; without it all")
    return parser.parse_args()


def make_bench(ckpt: Path, data: DataSet) -> tuple[Bench, Contender]:
    """The data set and the model as test.py has them. Raises ValueError where `ckpt` is more than one model."""
    checkpoint, loader = one_checkpoint(ckpt), ModelLoader(device_of("cpu"))
    model = loader(checkpoint)
    return Bench(data, loader.backbone, Batching(EVAL_BATCH, 0, "fp32")), Contender(checkpoint, model, ckpt.stem)


def by_anomalib(ckpt: Path, data: DataSet, class_name: str, place: Path, **parts: Any) -> dict[str, float]:
    """{metric: value} of a class by anomalib, which writes into `place`; `parts` of the model that are not its own."""
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Max

    from bridges.anomalib import CrossAttentionAAClip

    fields = {"pixel_": ["anomaly_map", "gt_mask"], "image_": ["pred_score", "gt_label"]}
    metrics = [kind(fields=of, prefix=prefix) for kind in (AUROC, F1Max) for prefix, of in fields.items()]
    evaluator = Evaluator(test_metrics=[*metrics, AUPRO(fields=fields["pixel_"], prefix="pixel_")])
    name = data.descriptions[class_name]
    model = CrossAttentionAAClip(ckpt, name, data.domain, evaluator=evaluator, visualizer=False, **parts)
    datamodule = MVTecAD(data.folder, class_name, eval_batch_size=EVAL_BATCH, num_workers=0)
    engine = Engine(default_root_dir=place, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    (found,) = engine.test(model, datamodule=datamodule, verbose=False)
    return {metric: found[theirs] for metric, (_, theirs) in COMPARED.items() if theirs}


def compare(ckpt: Path, data: DataSet, place: Path) -> dict[str, list[dict[str, float]]]:
    """{program: {metric: value} of each class}."""
    from anomalib.pre_processing import PreProcessor

    bench, contender = make_bench(ckpt, data)
    size = contender.model.backbone.img_size
    resize = v2.Resize((size, size), InterpolationMode.BICUBIC, antialias=True)
    as_others = PreProcessor(v2.Compose([resize, v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)]))
    given: dict[str, Any] = {"post_processor": False}
    runs = {GIVEN: given, RESIZED: given | {"pre_processor": as_others}, DEFAULT: {}}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (OWN, *runs)}
    for class_name, (scores,) in scores_by_class(bench, [contender], lambda: None):
        found[OWN].append(scores.metrics(scores.sample()))
        for name, parts in runs.items():
            found[name].append(by_anomalib(ckpt, data, class_name, place, **parts))
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Means over the classes, in percent; behind anomalib's the largest difference of a class."""
    lines = [f"| | {' | '.join(found)} |", f"|---{'|---' * len(found)}|"]
    for metric, (title, _) in COMPARED.items():
        own = [values[metric] for values in found[OWN]]
        cells = [f"{100 * statistics.mean(own):.3f}"]
        for name in list(found)[1:]:
            theirs = [values[metric] for values in found[name] if metric in values]
            most = max((abs(a - b) for a, b in zip(own, theirs, strict=False)), default=0)
            cells.append(f"{100 * statistics.mean(theirs):.3f} ({100 * most:.3f})" if theirs else "n/a")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def part_of(data: DataSet, classes: list[str]) -> DataSet:
    """The same with some of its classes alone. Raises ValueError where one is not there, or lies not as in MVTec."""
    if unknown := [name for name in classes if name not in data.descriptions]:
        raise ValueError(f"--classes {' '.join(unknown)}: expected some of {', '.join(data.descriptions)}.")
    if others := [name for name in classes if not (data.folder / name / "test" / "good").is_dir()]:
        raise ValueError(f"--data {data.folder}: expected MVTec's tree, found no {others[0]}/test/good.")
    records = [record for record in data.records if record.class_name in classes]
    return replace(data, records=records, descriptions={name: data.descriptions[name] for name in classes})


def main() -> None:
    args = parse_arguments()
    check_there(args.ckpt)
    data = open_dataset(str(args.data.absolute()), "")
    data = part_of(data, args.classes or list(data.descriptions))
    logging.captureWarnings(False)
    logging.disable(logging.INFO)  # of each of anomalib's runs
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as place:
        warnings.simplefilter("ignore")  # of what anomalib imports, and Lightning's of what does not matter here
        try:
            import bridges.anomalib  # noqa: F401, which says what is missing
        except ImportError as error:
            raise ValueError(str(error)) from error
        show(table(compare(args.ckpt, data, Path(place))), REASONS)


if __name__ == "__main__":
    run_script(main)
