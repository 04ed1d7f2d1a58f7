"""Command-line arguments that several scripts share. Flags keep AA-CLIP's names."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

from dataset.commands import add_data_root, path_argument
from dataset.constants import BLUR
from dataset.images import MOST_PIXELS, take_pixels
from dataset.records import check_class
from dataset.words import printable
from model.config import WEIGHT_FOLDERS, ModelConfig, model_fields
from utils import processes
from utils.machine import Machine, default_device, default_workers, is_cuda, own_processors, take_tf32
from utils.options import add_fields, add_flag, at_least

logger = logging.getLogger(__name__)


def class_argument(text: str) -> str:
    """What images show, in words that a prompt and a table can hold."""
    try:
        check_class(text, "it")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name, without control characters") from None
    return text


# Flags of more than one script, described as `utils.options` reads them.
DOMAIN: dict[str, Any] = {
    "help": "of a data set that is not known; without it industrial",
    "choices": tuple(BLUR),
    "group": "data",
}
CLASS_NAME: dict[str, Any] = {
    "help": "what the images of a data set that is not known show, where all show one thing ('object' works for any); "
    "without it the folder's name",
    "parse": class_argument,
    "group": "data",
}
FEWER_BITS = "of the values in image files of 16 bits, where all images have fewer, as a camera's 12"
BITS: dict[str, Any] = {
    "help": f"{FEWER_BITS}; without it found from the brightest of all",
    "least": 8,
    "most": 16,
    "group": "data",
}
REDUCED_JPEG: dict[str, Any] = {
    "help": "decode large JPEG files at 1/2, 1/4 or 1/8 of their size, where twice the model's input is left; quicker, "
    "and changes pixels by a few of 255 levels",
    "group": "data",
}
NORMAL_IMAGES = (
    "folder of known good images that text cross-attention in the joint space sees beside each image, the same number "
    "of each class in a folder of its name (of a single class also without); no longer zero-shot"
)
PRECISION: dict[str, Any] = {
    "help": "of the two towers; bf16 by autocast",
    "choices": ("fp32", "bf16"),
    "group": "places and machine",
}
DEFAULT_PRECISION = "fp32"
# Arguments that may differ between the machines of one job.
PLACES = ("clip_weights", "resized_images")
# Lines of all @FILEs of a call, and @FILEs within each other.
MOST_LINES, DEEPEST = 100_000, 20


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description; shows defaults, but for flags whose help says what happens without them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Reads arguments from @FILE too: several on a line, "quoted" where they hold spaces, and lines of # comments."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Of the command line, or of `args`."""
        self.lines = 0
        words = list(self._expanded(sys.argv[1:] if args is None else args))
        return super().parse_known_args(words, namespace)

    def _expanded(self, words: Iterable[str], depth: int = 0) -> Iterator[str]:
        """Words, with what is in an @FILE in its place."""
        if depth > DEEPEST:
            self.error("an @FILE that names itself, or very many others")
        for word in words:
            if not word.startswith("@"):
                yield word
                continue
            path = Path(os.path.expanduser(word[1:]))
            for line in self._lines_of(path):
                yield from self._expanded(_seen_from(path, self._words(line)), depth + 1)

    def _lines_of(self, path: Path) -> list[str]:
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name that no file has
            reason = getattr(error, "strerror", None) or error
            self.error(
                f"@{path}: {reason}. An argument that begins with @ stands for a file of arguments; a name that does "
                "is given as ./@NAME"
            )
        try:
            lines = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            self.error(f"@{path}: not UTF-8 ({error})")
        self.lines += len(lines)
        if self.lines > MOST_LINES:
            self.error(f"more than {MOST_LINES} lines in @FILEs; does one name itself")
        return lines

    def _words(self, line: str) -> list[str]:
        if line.lstrip().startswith("#"):
            return []
        words = shlex.shlex(line, posix=True, punctuation_chars="")
        words.whitespace_split, words.commenters, words.escape = True, "", ""  # backslashes are Windows paths
        try:
            return list(words)
        except ValueError as error:
            self.error(f"{error} in the line '{line.strip()}' of an @FILE")

    def error(self, message: str) -> NoReturn:
        """One line, not the list of all flags; a mistyped flag gets its likely name."""
        known = [flag for action in self._actions for flag in action.option_strings]
        words = [word.rstrip(":,") for word in message.split() if word.startswith("--")]
        likely = [get_close_matches(word, known, 1) for word in words]
        hint = "".join(f" Did you mean {names[0]}?" for names in likely if names and names[0] not in words)
        if message.startswith("unrecognized arguments: -") and not words:
            hint = " A file whose name begins with - is given as ./-NAME."
        said = printable(shorten(message, 400))
        self.exit(2, f"{self.prog}: error: {said}.{hint} --help lists all flags.\n")


def _seen_from(file: Path, words: list[str]) -> Iterator[str]:
    """The words of a line of an @FILE.

    A path that is not there as seen from here is looked for from the file's folder
    and from those above it, so that a recipe beside what it names can be used from anywhere. --save_path stays.
    """
    for before, word in zip(["", *words], words, strict=False):
        name = word.removeprefix("@")
        found = None
        if "/" in name and before != "--save_path" and not os.path.lexists(name):
            found = next((folder / name for folder in file.absolute().parents if (folder / name).exists()), None)
        yield word if found is None else f"{word[: -len(name)]}{found}"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser without abbreviations, so that a mistyped flag is an error; "@FILE" stands for the arguments in FILE."""
    return _Parser(
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
        epilog='"@FILE" stands for the arguments in FILE; those after it on the command line win. Paths in it that are '
        "not there as seen from here are looked for from its folder upwards, but for --save_path.",
    )


def add_model_arguments(parser: argparse.ArgumentParser, without: str, extension: str | None = None) -> None:
    """What the model is; `without` says what holds without a flag, `extension` the same of the cross-attentions.

    Without `extension` there are no flags of these.
    """
    if extension:
        add_fields(parser, ModelConfig, model_fields(extension=True), keep_open=extension)
    add_fields(parser, ModelConfig, model_fields(extension=False), keep_open=without)


def add_own_data_arguments(parser: argparse._ActionsContainer) -> None:
    """What is told of data sets that the program does not know."""
    add_flag(parser, "domain", str, DOMAIN, None)
    add_flag(parser, "class_name", str, CLASS_NAME, None)
    add_flag(parser, "bits", int, BITS, None)


def add_weights_argument(group: argparse._ActionsContainer) -> None:
    """Where CLIP is."""
    group.add_argument(
        "--clip_weights",
        type=path_argument,
        help=f"CLIP's weight file; else {', '.join(WEIGHT_FOLDERS)} are searched, then it is downloaded",
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where CLIP is and what computes."""
    group = parser.add_argument_group(PRECISION["group"])
    add_weights_argument(group)
    group.add_argument("--device", help="what computes, by PyTorch's name [cuda where there is one, else cpu]")
    add_flag(group, "precision", str, PRECISION, DEFAULT_PRECISION)
    group.add_argument(
        "--tf32", action="store_true", help="on a GPU, fp32 products of factors rounded to TF32: faster, less exact"
    )
    group.add_argument(
        "--threads",
        type=at_least(1, 1024),
        help="that compute on the CPU; without it as many as PyTorch finds processors, or OMP_NUM_THREADS",
    )
    group.add_argument(
        "--max_pixels",
        type=at_least(1),
        default=MOST_PIXELS,
        help="of an image; one of more is taken for a hostile file",
    )
    return group


def add_run_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where things are, what reads and what computes."""
    group = add_machine_arguments(parser)
    add_data_root(group)
    group.add_argument(
        "--skip_broken",
        action="store_true",
        help="leave out images that cannot be read, or whose mask cannot, and say so",
    )
    group.add_argument(
        "--resized_images",
        type=path_argument,
        help="folder that keeps images and masks at the model's size, filled as they are read; no result depends on it",
    )
    group.add_argument(
        "--num_workers",
        type=at_least(0, 256),
        help="processes that read images; without it on a GPU its share of the processors, at most 16, else 0",
    )
    return group


def add_compile_argument(group: argparse._ActionsContainer) -> None:
    """Whether PyTorch compiles the visual forward."""
    group.add_argument(
        "--compile",
        action="store_true",
        help="the visual forward by torch.compile: minutes at the start, then faster; results differ by rounding",
    )


def refuse_of_exported(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag that is given and means nothing to exported models, which are all there is."""
    flags = {**dict.fromkeys(("clip_weights", "normal_images")), "compile": False, "tf32": False}
    flags |= {"precision": DEFAULT_PRECISION, **dict.fromkeys(model_flags(args))}
    for name, without in flags.items():
        if getattr(args, name) != without:
            raise ValueError(
                f"--{name}: goes with checkpoints; what an exported model does was decided by export.py. Leave it out."
            )


def take_machine(args: argparse.Namespace) -> None:
    """What this process keeps to from now on, of `add_machine_arguments`."""
    import torch

    take_pixels(args.max_pixels)
    args.device = args.device or default_device()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
        if args.threads > (there := own_processors()):
            logger.warning("--threads %d: they hold each other up on %d processors.", args.threads, there)
    take_tf32(args.tf32 and is_cuda(args.device))
    if args.tf32 and not is_cuda(args.device):
        logger.warning("--tf32: changes nothing on %s; expected a GPU of CUDA.", args.device)


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine of `add_run_arguments`."""
    take_machine(args)
    workers = default_workers(args.device) if args.num_workers is None else args.num_workers
    data_root, files = Path(args.data_root), (args.follow_links, args.skip_broken, args.resized_images)
    return Machine(args.device, args.clip_weights, data_root, workers, *files)


def check_same(args: argparse.Namespace, more: Callable[[], Mapping[str, object]]) -> None:
    """Raise ValueError where processes of one job have other arguments, or `more` that is not the same in all."""
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in PLACES}
    processes.check_alike(lambda: flags | dict(more()))


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the arguments that have a value."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Arguments as words of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """{field of ModelConfig: value} of the model's flags that are given."""
    names = [field.name for extension in (True, False) for field in model_fields(extension)]
    return given(args, *(name for name in names if hasattr(args, name)))
