"""Fields of a dataclass -> flags of the command line, so that a flag is written down in one place.

What a flag is stands in its field: the annotation tells its type, `metadata` the rest:

    help       what it means and its unit
    least      the smallest number that is allowed
    most       the largest one
    positive   True for a number over 0
    choices    the values that are allowed
    parse      text -> value, where none of these will do
    flag       the flag's name, where it is not the field's (no_... switches off)
    without    what holds without the flag, where that is not the field's default
    group      title under which --help shows it
    added      True for a value that older records do not have: they were made with its default
"""

import argparse
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from textwrap import shorten
from types import NoneType
from typing import Any

# The largest number where a flag names no other: what PyTorch's own code holds as a C int.
MOST = 2**31 - 1
# The largest seed that NumPy and PyTorch both take.
MOST_SEED = 2**63 - 1
# The keys of such a description.
DESCRIBED = {"help", "least", "most", "positive", "choices", "parse", "flag", "without", "group", "added"}


def at_least(least: float, most: float = MOST, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Parser of a number of that kind from `least` to `most`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shorten(text, 30)!r}: expected {what}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: expected at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{shorten(str(value), 30)}: expected at most {most}")
        return value

    return number


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


def _parser_of(kind: Callable[[str], Any], about: Mapping[str, Any]) -> Callable[[str], Any]:
    if kind is float:
        kind = positive if about.get("positive") else finite
    if about.keys() & {"least", "most"}:
        return at_least(about.get("least", -math.inf), about.get("most", MOST), kind)
    return kind


def _list_of_one(parse: Callable[[str], Any]) -> Callable[[str], list]:
    def alone(text: str) -> list:
        return [parse(text)]

    return alone


def default_of(field: Field) -> Any:
    """The default of a field, None where it has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def flag_fields(kind: type) -> list[Field]:
    """The fields of a dataclass that are flags."""
    return [field for field in fields(kind) if "help" in field.metadata]


def completed(kind: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a record of a dataclass says, and the values that were `added` to it later, as they were then."""
    later = {field.name: default_of(field) for field in fields(kind) if field.metadata.get("added")}
    return later | dict(recorded)


def add_flag(
    parser: argparse._ActionsContainer,
    name: str,
    annotation: Any,
    about: Mapping[str, Any],
    default: Any,
    several: bool = True,
) -> None:
    """Add a flag that is described as a field's `metadata` is.

    A list takes several values, or, where that is not meant, one, which becomes a list of one. Raises TypeError for a
    description that is not understood.
    """
    if unknown := about.keys() - DESCRIBED:
        raise TypeError(f"{name}: a flag has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(DESCRIBED))}.")
    inner = [part for part in typing.get_args(annotation) if part is not NoneType]  # of int | None, of list[int]
    kind = inner[0] if inner else annotation
    flag = about.get("flag", name)
    words: dict[str, Any] = {"dest": name, "default": default, "help": about["help"]}
    if kind is bool:
        parser.add_argument(f"--{flag}", action="store_false" if flag.startswith("no_") else "store_true", **words)
        return
    parse = about.get("parse") or _parser_of(kind, about)
    if typing.get_origin(annotation) is list:
        if several:
            words["nargs"] = "+"
        else:
            parse = _list_of_one(parse)
            words["default"] = str(default[0])  # which is parsed, and shown without brackets
    parser.add_argument(f"--{flag}", type=parse, choices=about.get("choices"), **words)


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type,
    chosen: Iterable[Field],
    defaults: Mapping[str, Any] | None = None,
    keep_open: str | None = None,
    several: bool = True,
) -> None:
    """Add the flags of `chosen` fields of a dataclass, in the groups that they name; `several` as in `add_flag`.

    `defaults` go before the fields' own. With `keep_open`, what holds without a flag, said of each group, the flags
    have no default at all: then "not given" can be told from a value.
    """
    annotations, groups = typing.get_type_hints(kind), {}
    for field in chosen:
        about, default = dict(field.metadata), (defaults or {}).get(field.name, default_of(field))
        if keep_open is not None:
            holds = about.get("without", default)
            about["help"] += f" [{holds}]" if holds is not None else ""
            default = None
        title = about["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title, keep_open and f"without a flag: {keep_open}")
        add_flag(groups[title], field.name, annotations[field.name], about, default, several)
