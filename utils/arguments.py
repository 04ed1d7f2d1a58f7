"""Command-line arguments of the scripts, and what follows from them: the model's configuration and the settings.

Flags keep AA-CLIP's names.
"""

import argparse
import math
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from textwrap import shorten

import torch

from dataset.commands import add_data_root
from dataset.constants import BLUR
from dataset.transforms import AUGMENTATIONS
from model.adapter_cross_attention import ModelConfig
from model.backbone import DEFAULT_MODEL, WEIGHT_FOLDERS, clip_config, default_adapters
from utils.checkpoints import Checkpoint, adapter_kind
from utils.plan import LR_SCHEDULES, Settings

# Fields of ModelConfig that a base model leaves open.
EXTENSION = (
    "text_cross_attn",
    "image_cross_attn",
    "text_cross_attn_weight",
    "image_cross_attn_weight",
    "image_context",
)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description; shows defaults, but for flags whose help says what happens without them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Reads arguments from @FILE too: several on a line, "quoted" where they hold spaces, and lines of # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        if arg_line.lstrip().startswith("#"):
            return []
        words = shlex.shlex(arg_line, posix=True, punctuation_chars="")
        words.whitespace_split, words.commenters, words.escape = True, "", ""  # backslashes are Windows paths
        try:
            return list(words)
        except ValueError as error:
            self.error(f"{error} in the line '{arg_line.strip()}' of an @FILE")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser without abbreviations, so that a mistyped flag is an error; "@FILE" stands for the arguments in FILE."""
    return _Parser(
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        epilog='"@FILE" stands for the arguments in FILE; those after it on the command line win.',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where things are, what reads and what computes."""
    group = add_machine_arguments(parser)
    add_data_root(group)
    group.add_argument(
        "--num_workers", type=at_least(0), help="processes that read images; without it 4 on a GPU, else 0"
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where CLIP is and what computes."""
    group = parser.add_argument_group("places and machine")
    group.add_argument(
        "--clip_weights",
        type=Path,
        help=f"CLIP's weight file; else {', '.join(WEIGHT_FOLDERS)} are searched, then it is downloaded",
    )
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device PyTorch computes on"
    )
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the two towers; bf16 by autocast"
    )
    return group


def add_model_arguments(parser: argparse.ArgumentParser, without: str) -> None:
    """What the model is; `without` says what holds without a flag."""
    group = parser.add_argument_group("model", f"without a flag: {without}")
    group.add_argument("--model_name", help=f"CLIP by open_clip's name, or demo [{DEFAULT_MODEL}]")
    group.add_argument(
        "--img_size",
        type=at_least(1),
        help="side of the square input in pixels [518 for ViT-L-14-336, else the model's]",
    )
    group.add_argument(
        "--quick_gelu",
        action="store_true",
        default=None,
        help="OpenAI's activation [plain GELU, as published bases have]",
    )
    group.add_argument("--relu", action="store_true", default=None, help="LeakyReLU after the image projectors [none]")
    group.add_argument("--adapter_hidden", type=at_least(1), help="adapters with a bottleneck of this width [none]")
    group.add_argument("--text_adapt_weight", type=finite, help="weight of a text adapter's output [0.1]")
    group.add_argument("--image_adapt_weight", type=finite, help="weight of an image adapter's output [0.1]")
    group.add_argument(
        "--text_adapt_until",
        type=at_least(1),
        help="number of text blocks with an adapter [a quarter of them, 3 of ViT-L's 12]",
    )
    group.add_argument(
        "--image_adapt_until",
        type=at_least(1),
        help="number of ViT blocks with an adapter [a quarter of them, 6 of ViT-L's 24]",
    )


def add_training_arguments(parser: argparse.ArgumentParser, stage1_levels: str) -> None:
    """What both trainers have in common."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="VisA",
        help="data set to train on: a known name, a folder under --data_root, or the path of a folder or .jsonl file",
    )
    add_own_data_arguments(group)
    group.add_argument(
        "--shot",
        type=_shot,
        default="full",
        help="K for K images per class, half of them normal and half anomalous, drawn by --seed (or those of a list "
        "K-shot.jsonl beside full-shot.jsonl); full or 0 for all",
    )
    group.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        default="published",
        help="published: moved by nearest neighbours, filled with the mean colour; smooth: bilinear and reflected",
    )
    group.add_argument(
        "--val_fraction", type=_fraction, default=0.0, help="share of each class held out; its losses are logged"
    )
    group = parser.add_argument_group("training")
    group.add_argument("--text_batch_size", type=at_least(1), default=16, help="images per step of Stage 1")
    group.add_argument("--image_batch_size", type=at_least(1), default=2, help="images per step of Stage 2")
    group.add_argument("--text_lr", type=positive, default=1e-5, help="learning rate of Stage 1")
    group.add_argument(
        "--image_lr", type=positive, default=5e-4, help="learning rate of Stage 2, halved at steps 16000 and 32000"
    )
    group.add_argument(
        "--lr_schedule",
        choices=LR_SCHEDULES,
        default="steps",
        help="steps: these halvings, as published; cosine: to zero at the end of each stage",
    )
    group.add_argument(
        "--warmup_steps", type=at_least(0), default=0, help="steps of each stage over which learning rates rise"
    )
    group.add_argument("--text_norm_weight", type=finite, default=0.1, help="weight of Stage 1's orthogonal term")
    group.add_argument(
        "--stage1_levels",
        choices=("last", "all"),
        default=stage1_levels,
        help="levels that train Stage 1: the last, as the published code, or the sum of all, as the paper",
    )
    group.add_argument(
        "--vv_attention",
        choices=("batch", "image"),
        default="batch",
        help="Stage 1's V-V attention: across the batch, as published bases were trained, or within the image",
    )
    group.add_argument(
        "--surgery_until_layer",
        type=at_least(1),
        help="20 for V-V attention in the last 19 ViT blocks, and so on; without it the share that is 19 of ViT-L's 24",
    )
    group.add_argument(
        "--seed", type=at_least(0), default=111, help="of new weights, sample order, augmentation and draws"
    )
    group.add_argument(
        "--cache_images",
        action="store_true",
        help="keep decoded images in memory where they fit in half of what is free",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="write what log.csv has to <run>/tensorboard too, where it is installed",
    )
    group.add_argument("--dry_run", action="store_true", help="print the plan and stop; needs neither weights nor data")


def add_own_data_arguments(parser: argparse._ActionsContainer) -> None:
    """What is told of data sets that the program does not know."""
    parser.add_argument("--domain", choices=tuple(BLUR), help="of a data set that is not known; without it industrial")
    parser.add_argument(
        "--class_name",
        type=_word,
        help="what the images of a data set that is not known show, where all show one thing ('object' works for any); "
        "without it the folder's name",
    )


def at_least(least: int) -> Callable[[str], int]:
    """Parser of a whole number of at least `least`."""

    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: expected at least {least}")
        return value

    return whole


def epochs(text: str) -> list[int]:
    """One number of epochs, as a list of one."""
    return [at_least(1)(text)]


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def positive(text: str) -> float:
    """A finite number over 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number over 0")
    return value


def _word(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a name")
    return text


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 0 and less than 1")
    return value


def _shot(text: str) -> int | None:
    if text in ("full", "0"):
        return None
    value = at_least(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"{text}: expected an even number, half normal and half anomalous images")
    return value


def device_of(args: argparse.Namespace) -> torch.device:
    """The device of --device. Raises ValueError where PyTorch cannot use it."""
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a PyTorch built without CUDA
        raise ValueError(f"--device {args.device}: not usable here ({shorten(str(error), 160)}).") from error
    return device


def workers_of(args: argparse.Namespace) -> int:
    """The number of reading processes."""
    if args.num_workers is not None:
        return args.num_workers
    return 4 if args.device.startswith("cuda") else 0


def given(args: argparse.Namespace, *names: str) -> list[str]:
    """Those of the arguments that have a value, as words of a command line."""
    values = {name: getattr(args, name) for name in names}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a run, from the arguments of the same names."""
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def resolve_model(
    args: argparse.Namespace, checkpoint: Checkpoint | None = None, defaults: dict | None = None
) -> tuple[ModelConfig, list[str]]:
    """The model's configuration: of the checkpoint (its record or its keys), else flags, `defaults`, AA-CLIP's values.

    A base leaves the extension to the flags, a loop file does not. Returns the configuration, and what was assumed for
    a base that names nothing (AA-CLIP's own files). Raises ValueError for a flag that contradicts the checkpoint.
    """
    known = {}
    if checkpoint is not None:
        known = adapter_kind(checkpoint)
        if checkpoint.model is not None:
            recorded = checkpoint.model
            known = recorded if checkpoint.is_loop_file else {k: v for k, v in recorded.items() if k not in EXTENSION}
    names = [field.name for field in fields(ModelConfig)]
    flags = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    for name, value in flags.items():
        if name in known and known[name] != value:
            raise ValueError(
                f"--{name} {value}: contradicts {checkpoint.path}, which has {known[name]}. Leave the flag out."
            )
    chosen = {"model_name": DEFAULT_MODEL} | (defaults or {}) | flags | known
    clip = clip_config(chosen["model_name"], chosen.get("img_size"), chosen.get("quick_gelu", False))
    chosen = default_adapters(clip) | chosen | {"img_size": clip["vision_cfg"]["image_size"]}
    config = ModelConfig(**chosen)
    silent = ("model_name", "img_size", "quick_gelu", "text_adapt_weight", "image_adapt_weight")
    assumed = [f"--{name} {getattr(config, name)}" for name in silent if name not in known]
    return config, assumed if checkpoint is not None else []
