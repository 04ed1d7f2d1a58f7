"""Models under test: which checkpoints are compared with which, and their results in one pass over the images."""

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.loading import AnomalyDataset, make_loader
from dataset.records import Record
from dataset.sets import DataSet, canonical_name
from dataset.transforms import Transform
from forward_utils_cross_attention import ClassText, Prediction, PromptBank, predict
from model.adapter_cross_attention import CrossAttentionCLIP
from model.backbone import Backbone, load_backbone
from utils import arguments
from utils.bootstrap import enough, resample
from utils.checkpoints import TEXT_FILE, Checkpoint, build_model, load_checkpoint, loop_files
from utils.logs import progress
from utils.metrics import METRICS, ClassScores, Sample, check_finite, find_defects, mean_over_classes

logger = logging.getLogger(__name__)

AVERAGE = "average"


@dataclass
class Tested:
    """A model under test, what it is compared with ({"base": ..., "control": ...}; a base: nothing), and its results.

    By class and for AVERAGE: `results` {metric: value} and `resampled` {metric: [R]}; by class `samples`.
    """

    checkpoint: Checkpoint
    model: CrossAttentionCLIP
    name: str
    references: dict[str, "Tested"] = field(default_factory=dict)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    resampled: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        """Whether this is a base, in its own folder or as a loop_0.pth."""
        return self.checkpoint.loop == 0

    @property
    def folder(self) -> Path:
        """Where files about this model go: the folder of its run, or of the base."""
        path = self.checkpoint.path
        return path.parent if self.checkpoint.is_loop_file else path

    @property
    def seed(self) -> int | None:
        """Seed of its training, a base's of its own; None where it is not known."""
        checkpoint = self.checkpoint
        return ((checkpoint.training if checkpoint.loop else checkpoint.base.get("training")) or {}).get("seed")

    @property
    def classes(self) -> list[str]:
        """The classes of its results, without AVERAGE."""
        return list(self.samples)

    def was_trained_on(self, data: DataSet) -> bool | str:
        """Whether the model has seen this data set, "unknown" where its base does not tell."""
        seen = {canonical_name(name) for name in self.checkpoint.seen()}
        return data.name in seen or ("unknown" if "unknown" in seen else False)


class Batching(NamedTuple):
    """How images go through the models; results do not depend on the first two."""

    batch_size: int
    num_workers: int
    precision: str


def checkpoints_of(path: Path) -> list[Checkpoint]:
    """The checkpoints that an argument of --ckpt names: one, or all loops of a run folder."""
    if path.is_dir() and not (path / TEXT_FILE).is_file() and loop_files(path):
        return [load_checkpoint(file) for file in loop_files(path)]
    return [load_checkpoint(path)]


def identity(checkpoint: Checkpoint) -> str:
    """The same for two checkpoints of one model: a base is known by its files and how it reads them, in any run."""
    if checkpoint.loop == 0:
        model = {name: value for name, value in (checkpoint.model or {}).items() if name not in arguments.EXTENSION}
        return " ".join([*sorted(checkpoint.base["sha256"].values()), repr(sorted(model.items()))])
    return str(checkpoint.path.resolve())


class Wanted(NamedTuple):
    """A checkpoint to test and the identities of what it is compared with, {"base": ..., "control": ...}."""

    checkpoint: Checkpoint
    references: dict[str, str]


def collect(paths: list[Path], controls: list[Path]) -> dict[str, Wanted]:
    """{identity: ...} of all that is asked for and what it is compared with; references come before what needs them.

    A loop's base is the loop_0.pth beside it; its control the same loop of `controls`, of its own seed where there are
    several. Raises FileNotFoundError where a base is missing, ValueError where no loop has a control.
    """
    found: dict[str, Wanted] = {}
    pool = [checkpoint for path in controls for checkpoint in checkpoints_of(path) if checkpoint.loop]

    def add(checkpoint: Checkpoint, control: Checkpoint | None = None) -> str:
        key = identity(checkpoint)
        references = {}
        if checkpoint.loop:
            references["base"] = add(load_checkpoint(checkpoint.path.parent / "loop_0.pth"))
            if control and identity(control) != key:
                references["control"] = add(control)
        known = found.get(key)
        # AA-CLIP's own files of a base hold no calibration, a loop_0.pth of the same base does.
        if known is None or (known.checkpoint.calibration is None and checkpoint.calibration is not None):
            found[key] = Wanted(checkpoint, references)
        return key

    for each in pool:
        if each.training["feedback"] != "off" or any(each.modules[name] for name in each.modules if "cross" in name):
            logger.warning("--control: %s is no longer base: it has feedback or cross-attention.", each.path)
    asked = [checkpoint for path in paths for checkpoint in checkpoints_of(path)]
    for checkpoint in asked:
        same = [each for each in pool if each.loop == checkpoint.loop]
        own = [each for each in same if each.training["seed"] == checkpoint.training["seed"]] if len(same) > 1 else same
        if len(own) > 1:
            raise ValueError(f"--control: {len(own)} are loop {own[0].loop} of seed {own[0].training['seed']}.")
        add(checkpoint, own[0] if own else None)
        if pool and checkpoint.loop and not own:
            logger.warning("--control: has no loop %d for %s.", checkpoint.loop, checkpoint.path)
        elif own and own[0].training["seed"] != checkpoint.training["seed"]:
            logger.warning("--control: %s is of another seed than %s.", own[0].path, checkpoint.path)
    if controls and not any("control" in wanted.references for wanted in found.values()):
        loops = sorted({each.loop for each in pool})
        raise ValueError(
            f"--control {' '.join(map(str, controls))}: expected other runs with the loops of --ckpt; found loops "
            f"{loops}, none of which is the loop (and where there are several the seed) of another run in --ckpt."
        )
    return found


class ModelBuilder:
    """Makes the models of checkpoints, all on one backbone, which is loaded for the first.

    `args` holds what a checkpoint leaves open: the model's flags, `clip_weights` and `device`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, arguments.device_of(args)
        self.backbone: Backbone | None = None

    def __call__(self, checkpoint: Checkpoint) -> CrossAttentionCLIP:
        """Raises ValueError where the checkpoint's backbone is not that of the others."""
        config, assumed = arguments.resolve_model(self.args, checkpoint)
        if assumed:
            logger.info("%s names no backbone. Assumed: %s", checkpoint.path, " ".join(assumed))
        own = (config.model_name, config.img_size, config.quick_gelu)
        if self.backbone is None:
            self.shared, self.backbone = own, load_backbone(*own, self.args.clip_weights)
        if own != self.shared:
            raise ValueError(
                f"{checkpoint.path}: its backbone (name, size in px, quick-GELU) is {own}, "
                f"that of the others {self.shared}. Test them in two calls."
            )
        model = build_model(config, self.backbone, checkpoint, self.device)
        model.set_stage(None)
        return model


def load_models(
    paths: list[Path], controls: list[Path], build: Callable[[Checkpoint], CrossAttentionCLIP]
) -> list[Tested]:
    """Every checkpoint asked for and what it is compared with. `build` makes the models, all on one backbone."""
    tested: dict[str, Tested] = {}
    wanted = collect(paths, controls)
    names = model_names([each.checkpoint for each in wanted.values()])
    for (key, (checkpoint, references)), name in zip(wanted.items(), names, strict=True):
        known = {title: tested[other] for title, other in references.items()}
        tested[key] = Tested(checkpoint, build(checkpoint), name, known)
    return list(tested.values())


def model_names(checkpoints: list[Checkpoint]) -> list[str]:
    """A name for each checkpoint: the end of its path, as long as it takes to tell it from the others."""

    def end(checkpoint: Checkpoint, more: int) -> str:
        path = checkpoint.path.resolve()
        parts = (path.with_suffix("") if checkpoint.is_loop_file else path).parts
        return "/".join(parts[-(more + (2 if checkpoint.is_loop_file else 1)) :])

    more = [0] * len(checkpoints)
    while True:
        names = [end(checkpoint, extra) for checkpoint, extra in zip(checkpoints, more, strict=True)]
        twice = [row for row, name in enumerate(names) if names.count(name) > 1]
        if not twice:
            break
        for row in twice:
            more[row] += 1
    return [
        f"{name} (base)" if checkpoint.loop == 0 and "base" not in name else name
        for checkpoint, name in zip(checkpoints, names, strict=True)
    ]


def predictions(
    tested: list[Tested], data: DataSet, bank: PromptBank, records: list[Record], batching: Batching
) -> Iterator[tuple[dict, list[Prediction]]]:
    """Batches of `records`, and every model's predictions on them. Raises ValueError where one is not finite."""
    backbone: Backbone = tested[0].model.backbone
    texts = [ClassText(each.model, bank, fixed=True) for each in tested]
    images = AnomalyDataset(data.folder, records, Transform(backbone.img_size))
    for batch in make_loader(images, batching.batch_size, batching.num_workers):
        pixels, names = batch["image"].to(backbone.device), batch["class_name"]
        found = [
            predict(each.model, pixels, names, text, data.domain, batching.precision)
            for each, text in zip(tested, texts, strict=True)
        ]
        for prediction in found:
            check_finite(prediction, batch["path"])
        yield batch, found


def evaluate(
    tested: list[Tested], data: DataSet, bank: PromptBank, batching: Batching, resamples: int, seed: int
) -> None:
    """Fill in the results of every model on `data` in one pass over its images, which come class by class."""
    for each in tested:
        for kept in (each.results, each.resampled, each.samples):
            kept.clear()
    records = [record for class_name in data.descriptions for record in data.of_class(class_name)]
    left = Counter(record.class_name for record in records)
    scores: dict[str, list[ClassScores]] = {}  # of the classes in hand: at most those of one batch
    emptied = 0
    with progress(total=len(records), desc=data.name, unit="image") as bar:
        for batch, found in predictions(tested, data, bank, records, batching):
            names = batch["class_name"]
            defects = [find_defects(mask.numpy()) for mask in batch["mask"].squeeze(1)]
            emptied += int(batch["emptied"].sum())
            for class_name in dict.fromkeys(names):
                if class_name not in scores:
                    scores[class_name] = [ClassScores(data.domain, each.checkpoint.calibration) for each in tested]
                rows = [row for row, name in enumerate(names) if name == class_name]
                for kept, prediction in zip(scores[class_name], found, strict=True):
                    kept.add(prediction, batch, rows, defects)
            left.subtract(names)
            for class_name in [name for name in scores if not left[name]]:
                number = list(data.descriptions).index(class_name)
                finish_class(tested, class_name, scores.pop(class_name), (seed, number), resamples)
            bar.update(len(names))
    if emptied:
        logger.warning(
            "%s: %d masks are empty at the model's image size: no defect is found there.", data.name, emptied
        )
    seen = [each.name for each in tested if each.was_trained_on(data) is True]
    if seen:
        logger.warning(
            "NOT ZERO-SHOT: trained on %s, the data set of this test: %s. "
            "These numbers say how well it fits, not how well it transfers.",
            data.name,
            ", ".join(seen),
        )
    for each in tested:
        each.results[AVERAGE] = mean_over_classes(list(each.results.values()))
        each.resampled[AVERAGE] = mean_over_classes(list(each.resampled.values()))
        if not all(enough(sample.labels) for sample in each.samples.values()):
            each.resampled[AVERAGE] = dict.fromkeys(METRICS, np.full(resamples, np.nan))


def finish_class(
    tested: list[Tested], class_name: str, scores: list[ClassScores], seed: tuple[int, ...], resamples: int
) -> None:
    """Turn what was taken in of a class into every model's results, all resampled by the same draws."""
    for each, kept in zip(tested, scores, strict=True):
        each.samples[class_name] = kept.sample()
        each.results[class_name] = kept.metrics(each.samples[class_name])
    samples = [each.samples[class_name] for each in tested]
    for each, values in zip(tested, resample(samples, seed, resamples), strict=True):
        each.resampled[class_name] = values
