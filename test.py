"""Test checkpoints beside the base they started from, on the same images.

    python test.py --ckpt ckpt/<run>/loop_3.pth --dataset MVTec

--ckpt takes loop files, run folders (all their loops) and base models; several at once. Prints a table per data set
and writes a CSV file beside each checkpoint; --pictures adds a sheet of anomaly maps per class.
"""

import argparse
import csv
import logging
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dataset.loading import AnomalyDataset, make_loader
from dataset.sets import DataSet, canonical_name, open_dataset
from dataset.transforms import Transform
from forward_utils_cross_attention import ClassText, PromptBank, check_grid, predict
from model.adapter_cross_attention import CrossAttentionCLIP
from model.backbone import load_backbone
from utils import arguments
from utils.checkpoints import TEXT_FILE, Checkpoint, build_model, load_checkpoint, loop_files
from utils.cli import run_script
from utils.logs import progress
from utils.metrics import METRICS, ClassScores, mean_over_classes
from utils.plots import ContactSheets

logger = logging.getLogger("test")

AVERAGE = "average"


@dataclass
class Tested:
    """A model under test: its results by class, and the base it is compared with (None for a base)."""

    checkpoint: Checkpoint
    model: CrossAttentionCLIP
    base: "Tested | None" = None
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        path = self.checkpoint.path
        name = f"{path.parent.name}/{path.stem}" if self.checkpoint.is_loop_file else path.name
        return name if self.base else f"{name} (base)"

    def was_trained_on(self, data: DataSet) -> bool | str:
        """Whether the model has seen this data set, "unknown" where its base does not tell."""
        seen = {canonical_name(name) for name in self.checkpoint.seen()}
        return data.name in seen or ("unknown" if "unknown" in seen else False)


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, nargs="+", required=True, help="loop files, run folders or base models")
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=["MVTec"],
        help="data sets: known names, folders under --data_root, or paths of folders and .jsonl files",
    )
    arguments.add_own_data_arguments(parser)
    parser.add_argument(
        "--batch_size", type=arguments.at_least(1), default=8, help="images per forward; results do not depend on it"
    )
    parser.add_argument(
        "--pictures",
        type=arguments.at_least(0),
        default=0,
        help="anomalous and normal images per class in the sheets of anomaly maps; 0 for none",
    )
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    arguments.add_run_arguments(parser)
    return parser.parse_args()


def checkpoints_of(path: Path) -> list[Checkpoint]:
    """The checkpoints that an argument of --ckpt names: one, or all loops of a run folder."""
    if path.is_dir() and not (path / TEXT_FILE).is_file() and loop_files(path):
        return [load_checkpoint(file) for file in loop_files(path)]
    return [load_checkpoint(path)]


def base_of(checkpoint: Checkpoint) -> Checkpoint | None:
    """The loop_0.pth that a loop is compared with; None for a base. Raises FileNotFoundError where it is missing."""
    if checkpoint.loop == 0:
        return None
    return load_checkpoint(checkpoint.path.parent / "loop_0.pth")


def identity(checkpoint: Checkpoint) -> str:
    """The same for two checkpoints of one model: a base is known by the hashes of its files, whatever run it is in."""
    if checkpoint.loop == 0:
        return " ".join(sorted(checkpoint.base["sha256"].values()))
    return str(checkpoint.path.resolve())


def collect(paths: list[Path]) -> dict[str, tuple[Checkpoint, str | None]]:
    """{identity: (checkpoint, identity of its base)} of all that is asked for; each base comes before its loops."""
    found = {}
    for path in paths:
        for checkpoint in checkpoints_of(path):
            base = base_of(checkpoint)
            if base is not None:
                found.setdefault(identity(base), (base, None))
            found.setdefault(identity(checkpoint), (checkpoint, identity(base) if base else None))
    return found


def load_models(args: argparse.Namespace) -> list[Tested]:
    """Every checkpoint asked for and its base, all on one backbone. Raises ValueError where theirs differ."""
    device = arguments.device_of(args)
    tested: dict[str, Tested] = {}
    shared = backbone = None
    for key, (checkpoint, base) in collect(args.ckpt).items():
        config, assumed = arguments.resolve_model(args, checkpoint)
        if assumed:
            logger.info("%s names no backbone. Assumed: %s", checkpoint.path, " ".join(assumed))
        own = (config.model_name, config.img_size, config.quick_gelu)
        if backbone is None:
            shared, backbone = own, load_backbone(*own, args.clip_weights)
        if own != shared:
            raise ValueError(
                f"{checkpoint.path}: its backbone (name, size in px, quick-GELU) is {own}, "
                f"that of the others {shared}. Test them in two calls."
            )
        model = build_model(config, backbone, checkpoint, device)
        model.set_stage(None)
        tested[key] = Tested(checkpoint, model, tested[base] if base else None)
    return list(tested.values())


def evaluate(tested: list[Tested], data: DataSet, bank: PromptBank, args: argparse.Namespace) -> None:
    """Fill in the results of every model on `data` in one pass over its images, which come class by class.

    With --pictures, writes each class's contact sheet.
    """
    backbone = tested[0].model.backbone
    texts = [ClassText(each.model, bank, fixed=True) for each in tested]
    for each in tested:
        each.results.clear()
    records = [record for class_name in data.descriptions for record in data.of_class(class_name)]
    left = Counter(record.class_name for record in records)
    scores: dict[str, list[ClassScores]] = {}  # of the classes in hand: at most those of one batch
    images = AnomalyDataset(data.folder, records, Transform(backbone.img_size))
    sheets = ContactSheets([each.name for each in tested], args.pictures)
    with progress(total=len(records), desc=data.name, unit="image") as bar:
        for batch in make_loader(images, args.batch_size, arguments.workers_of(args)):
            pixels = batch["image"].to(backbone.device)
            names = batch["class_name"]
            predictions = [
                predict(each.model, pixels, names, text, data.domain, args.precision)
                for each, text in zip(tested, texts, strict=True)
            ]
            for class_name in dict.fromkeys(names):
                if class_name not in scores:
                    scores[class_name] = [ClassScores(data.domain) for _ in tested]
                rows = [row for row, name in enumerate(names) if name == class_name]
                for kept, prediction in zip(scores[class_name], predictions, strict=True):
                    kept.add(prediction, batch, rows)
            if args.pictures:
                sheets.add(batch, predictions)
            left.subtract(names)
            for class_name in [name for name in scores if not left[name]]:
                for each, kept in zip(tested, scores.pop(class_name), strict=True):
                    each.results[class_name] = kept.metrics()
                if args.pictures:
                    sheets.write(class_name, picture_folder(tested[-1], data) / f"{file_name(class_name)}.png")
            bar.update(len(pixels))
    for each in tested:
        each.results[AVERAGE] = mean_over_classes(list(each.results.values()))


def file_name(class_name: str) -> str:
    """A class name as a file name on every system."""
    return re.sub(r"[^\w.-]", "_", class_name)


def picture_folder(last: Tested, data: DataSet) -> Path:
    """Where the contact sheets of a data set go: beside the last checkpoint."""
    path = last.checkpoint.path
    return (path.parent if last.checkpoint.is_loop_file else path) / f"pictures_{data.name}"


def differences(each: Tested, class_name: str) -> dict[str, float]:
    """Results less the base's; NaN where a metric is undefined."""
    return {name: each.results[class_name][name] - each.base.results[class_name][name] for name in METRICS}


def percent(value: float, signed: bool = False) -> str:
    """A metric in percent, or n/a."""
    return "n/a" if math.isnan(value) else f"{100 * value:{'+' if signed else ''}.2f}"


def table(tested: list[Tested]) -> str:
    """Results of all models, class by class, and for those with a base the differences, in percent."""
    width = max(24, *(len(each.name) + 4 for each in tested))
    lines = [f"{'':{width}}" + "".join(f"{name.replace('_', ' '):>14}" for name in METRICS)]
    classes = [name for name in tested[0].results if name != AVERAGE or len(tested[0].results) > 2]
    for class_name in classes:
        lines.append(class_name)
        for each in tested:
            lines.append(
                f"  {each.name:{width - 2}}" + "".join(f"{percent(each.results[class_name][m]):>14}" for m in METRICS)
            )
            if each.base:
                moved = differences(each, class_name)
                lines.append(
                    f"  {'  less its base':{width - 2}}" + "".join(f"{percent(moved[m], True):>14}" for m in METRICS)
                )
    return "\n".join(lines)


def write_csv(each: Tested, data: DataSet, precision: str) -> Path:
    """Write a model's results beside its checkpoint: <loop>_<data set>.csv, in a base's folder base_<data set>.csv."""
    path = each.checkpoint.path
    stem = path.with_suffix("") if each.checkpoint.is_loop_file else path / "base"
    file_path = stem.with_name(f"{stem.name}_{data.name}.csv")
    rows = []
    for class_name, found in each.results.items():
        records = data.records if class_name == AVERAGE else data.of_class(class_name)
        row = {"checkpoint": path.as_posix(), "dataset": data.name, "class": class_name}
        row |= {"normal": sum(r.label == 0 for r in records), "anomalous": sum(r.label for r in records)}
        row |= found
        if each.base:
            row |= {f"{name}_base": value for name, value in each.base.results[class_name].items()}
            row |= {f"{name}_difference": value for name, value in differences(each, class_name).items()}
        row |= {"trained_on_this_data_set": each.was_trained_on(data)}
        rows.append(row | {"img_size": each.model.config.img_size, "precision": precision})
    with open(file_path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows
        )
    return file_path


def main() -> None:
    args = parse_arguments()
    data_sets = [open_dataset(name, args.data_root, args.domain, args.class_name) for name in args.dataset]
    name, count = Counter(data.name for data in data_sets).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--dataset: {count} are called {name}, and so would be their files. Test them in two calls.")
    tested = load_models(args)
    backbone = tested[0].model.backbone
    for data in data_sets:
        check_grid(backbone.grid, data.domain)
    banks = [PromptBank(backbone, data.descriptions) for data in data_sets]
    for data, bank in zip(data_sets, banks, strict=True):
        evaluate(tested, data, bank, args)
        print(f"\n{data.name}: {len(data.records)} images, in percent\n{table(tested)}")
        files = [write_csv(each, data, args.precision) for each in tested]
        logger.info("Wrote %s", ", ".join(map(str, files)))
        if args.pictures:
            logger.info("Pictures of the anomaly maps: %s", picture_folder(tested[-1], data))
        seen = [each.name for each in tested if each.was_trained_on(data) is True]
        if seen:
            logger.warning(
                "NOT ZERO-SHOT: trained on %s, the data set of this test: %s. "
                "These numbers say how well it fits, not how well it transfers.",
                data.name,
                ", ".join(seen),
            )


if __name__ == "__main__":
    run_script(main)
