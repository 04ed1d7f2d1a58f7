"""The settings of a run: each is a flag of the command line, a value in every checkpoint, and a field here."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dataset.commands import name_argument
from dataset.transforms import AUGMENTATIONS
from forward_utils_cross_attention import FEEDBACK
from utils.arguments import (
    BITS,
    CLASS_NAME,
    DEFAULT_PRECISION,
    DOMAIN,
    PRECISION,
    REDUCED_JPEG,
    add_compile_argument,
)
from utils.options import MOST_SEED, add_fields, at_least, flag_fields, positive

# Titles, in --help, of the flags that a base model's training does not have, and of those that each script has anyway.
LOOPS, MACHINE = "feedback loop", PRECISION["group"]


def _shot(text: str) -> int | None:
    if text in ("full", "0"):
        return None
    value = at_least(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"{text}: expected an even number, half normal and half anomalous images")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 0 and less than 1")
    return value


def _flag(help: str, default: Any, group: str = "training", **about: Any) -> Any:
    """A field that is a flag; `about` as in `utils.options`."""
    chosen: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**chosen, metadata={"help": help, "group": group, **about})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of a run that its result depends on; recorded in every checkpoint.

    Defaults are those of the feedback loops; train.py has its own for some.
    """

    dataset: str = _flag(
        "data set to train on: a known name, a folder under --data_root, or the path of a folder or .jsonl file",
        "VisA",
        "data",
        parse=name_argument,
    )
    domain: str | None = field(default=None, metadata=DOMAIN)
    class_name: str | None = field(default=None, metadata=CLASS_NAME | {"added": True})
    bits: int | None = field(default=None, metadata=BITS | {"added": True})
    reduced_jpeg: bool = field(default=False, metadata=REDUCED_JPEG | {"added": True})
    shot: int | None = _flag(
        "K for K images per class, half of them normal and half anomalous, drawn by --seed (or those of a list "
        "K-shot.jsonl beside full-shot.jsonl); full or 0 for all, as without it",
        None,
        "data",
        parse=_shot,
    )
    val_fraction: float = _flag("share of each class held out; its losses are logged", 0.0, "data", parse=_fraction)
    val_classes: int = _flag(
        "whole classes held out, drawn by --seed; their losses are logged, and calibrations are fitted to them",
        0,
        "data",
        least=0,
        added=True,
    )
    augment: str = _flag(
        "published: moved by nearest neighbours, filled with the mean colour; smooth: bilinear and reflected",
        "published",
        "data",
        choices=AUGMENTATIONS,
        added=True,
    )
    seed: int = _flag("of new weights, sample order, augmentation and draws", 111, least=0, most=MOST_SEED)
    text_epoch: list[int] = _flag(
        "epochs of Stage 1, where there are loops one for each; the last repeats", [5, 3, 2], least=1
    )
    image_epoch: list[int] = _flag("epochs of Stage 2, likewise", [20, 10, 5], least=1)
    text_batch_size: int = _flag("images per step of Stage 1", 16, least=1, most=65_536)
    image_batch_size: int = _flag("images per step of Stage 2", 2, least=1, most=65_536)
    text_lr: float = _flag("learning rate of Stage 1", 1e-5, positive=True)
    image_lr: float = _flag("learning rate of Stage 2, halved at steps 16000 and 32000", 5e-4, positive=True)
    text_cross_attn_lr: float | None = _flag(
        "learning rate of text cross-attention; without it Stage 1's", None, LOOPS, positive=True
    )
    image_cross_attn_lr: float | None = _flag(
        "learning rate of image cross-attention; without it Stage 2's", None, LOOPS, positive=True
    )
    lr_decay: float = _flag("loop k has its learning rates x this^(k-1)", 0.5, LOOPS, positive=True, most=2)
    lr_schedule: str = _flag(
        "steps: these halvings, as published; cosine: to zero at the end of each stage",
        "steps",
        choices=("steps", "cosine"),
        added=True,
    )
    warmup_steps: int = _flag("steps of each stage over which learning rates rise", 0, least=0, added=True)
    text_norm_weight: float = _flag("weight of Stage 1's orthogonal term", 0.1)
    det_temperature: float = _flag(
        "what Stage 2's cross-entropy multiplies the cosines of the detection feature by; published bases were trained "
        "with 1",
        1.0,
        positive=True,
        added=True,
    )
    cache_features: bool = _flag(
        "Stage 1 on features that are kept, in half precision: the image side looks at one view of each image, once a "
        "loop; in memory, or in the run's folder where they need more than half of what is free",
        False,
        added=True,
    )
    stage1_levels: str = _flag(
        "levels that train Stage 1: the last, as the published code, or the sum of all, as the paper",
        "all",
        choices=("last", "all"),
    )
    feedback: str = _flag(
        "what Stage 1 of loop 2 and later looks at: V1..V4 of the trained image side, the plain CLIP's tokens "
        "through the trained projectors, or loop 1's frozen features",
        "adapted",
        LOOPS,
        choices=FEEDBACK,
    )
    vv_attention: str = _flag(
        "Stage 1's V-V attention: across the batch, as published bases were trained, or within the image",
        "batch",
        choices=("batch", "image"),
    )
    surgery_until_layer: int | None = _flag(
        "20 for V-V attention in the last 19 ViT blocks, and so on; without it the share that is 19 of ViT-L's 24",
        None,
        least=1,
    )
    optimizer_state: str = _flag(
        "Adam's moments at the start of later loops", "reset", LOOPS, choices=("reset", "carry")
    )
    precision: str = field(default=DEFAULT_PRECISION, metadata=PRECISION)


def add_settings(parser: argparse.ArgumentParser, own: Mapping[str, Any] | None = None, loops: bool = True) -> None:
    """The flags of `Settings`, but for those of the machine; `own` defaults go before those of the fields.

    Without `loops` those of the feedback loop are left out, and stages have one number of epochs.
    """
    chosen = [entry for entry in flag_fields(Settings) if entry.metadata["group"] != MACHINE]
    if not loops:
        chosen = [entry for entry in chosen if entry.metadata["group"] != LOOPS]
    add_fields(parser, Settings, chosen, own, several=loops)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What a training does beside: nothing of it changes its result."""
    group = parser.add_argument_group("around the training")
    group.add_argument(
        "--cache_images",
        action="store_true",
        help="keep decoded images in memory where they fit in half of what is free",
    )
    add_compile_argument(group)
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="compute the blocks anew in the backward pass: less memory, more time, the same result",
    )
    group.add_argument(
        "--accumulate",
        type=at_least(1, 65_536),
        default=1,
        help="pieces in which a batch of Stage 2 goes through the model, for less memory; the result is the batch's",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="write what log.csv has to <run>/tensorboard too, where it is installed",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="print the plan and what to expect, and stop; needs neither weights nor data",
    )
    group.add_argument(
        "--device_tflops",
        type=positive,
        metavar="X",
        help="for --dry_run: what the device reaches in TFLOP/s; without it what an H100 did",
    )


def settings_of(args: argparse.Namespace, fixed: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a run, from the arguments of the same names; what is no argument is `fixed` or the default."""
    given = {entry.name: getattr(args, entry.name) for entry in fields(Settings) if hasattr(args, entry.name)}
    return Settings(**{**(fixed or {}), **given})
