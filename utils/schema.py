"""What checkpoint files hold, as types that are checked before anything of a file is used.

Strictly: a text is no number, and in files of this program a field that it does not know is an error. Whether tensors
are safe to use is checked where they are read (`model.weights`), whether they fit, where they are loaded.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError, with_config
from pydantic_core import CoreSchema
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from model.config import ModelConfig
from utils.calibration import Calibration
from utils.options import MOST
from utils.settings import Settings

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
# AA-CLIP's own files may hold more than is read of them.
OPEN = STRICT | ConfigDict(extra="ignore")

Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=MOST)]
State = dict[Text, Tensor]
StageName = Literal["text", "image"]


def _value(annotation: Any, about: Mapping[str, Any]) -> Any:
    """The type of one value that a field of a dataclass has, within the limits of its flag, see `utils.options`."""
    if about.get("choices"):
        return Literal[tuple(about["choices"])]
    if annotation is str:
        return Text
    least, positive = about.get("least"), 0 if about.get("positive") else None
    return Annotated[annotation, Field(ge=least, gt=positive, le=about.get("most"))]


def _fields_of(kind: type) -> Any:
    """A dict of the fields of a dataclass; those that were `added` may be missing."""
    annotations, found = typing.get_type_hints(kind), {}
    for field in fields(kind):
        annotation, about = annotations[field.name], field.metadata
        if typing.get_origin(annotation) is list:
            (inner,) = typing.get_args(annotation)
            value = Annotated[list[_value(inner, about)], Field(min_length=1, max_length=1000)]  # type: ignore[misc, valid-type]
        elif type(None) in typing.get_args(annotation):
            value = _value(typing.get_args(annotation)[0], about) | None
        else:
            value = _value(annotation, about)
        found[field.name] = NotRequired[value] if about.get("added") else value
    return with_config(STRICT)(TypedDict(f"{kind.__name__}Record", found))  # type: ignore[operator]


@dataclass(frozen=True)
class RecordOf:
    """Marks a dict as the record of a dataclass, for pydantic."""

    kind: type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(_fields_of(self.kind))


ModelRecord = Annotated[dict[str, Any], RecordOf(ModelConfig)]
SettingsRecord = Annotated[dict[str, Any], RecordOf(Settings)]
CalibrationRecord = Annotated[dict[str, Any], RecordOf(Calibration)]


@with_config(STRICT)
class Config(TypedDict):
    """What rebuilds a model, and how it was trained."""

    model: ModelRecord
    training: SettingsRecord


@with_config(STRICT)
class Continued(TypedDict):
    """The loop file that a run went on from."""

    path: Text
    sha256: Text


@with_config(STRICT)
class Base(TypedDict):
    """The base of a run; `training` is None where it is not known."""

    path: Text
    sha256: dict[Text, Text]
    epochs: dict[StageName, Count]
    datasets: list[Text]
    training: SettingsRecord | None
    continued_from: NotRequired[Continued]


@with_config(OPEN)
class Environment(TypedDict):
    """Where a file was made; versions and the like are for readers."""

    clip_sha256: NotRequired[Text | None]


@with_config(STRICT)
class LoopFile(TypedDict):
    """loop_<k>.pth: the four modules, None where switched off, and how they came to be."""

    text_adapter: State
    image_adapter: State
    text_cross_attn: State | None
    image_cross_attn: State | None
    config: Config
    base: Base
    loop: Count
    metrics: dict[Text, dict[Text, float]]
    calibration: NotRequired[CalibrationRecord | None]
    environment: Environment


@with_config(OPEN)
class HalfOfBase(TypedDict):
    """text_adapter.pth or image_adapter.pth; all but the epoch and the adapters are this program's own."""

    epoch: Count
    text_adapter: NotRequired[State]
    image_adapter: NotRequired[State]
    config: NotRequired[Config]
    calibration: NotRequired[CalibrationRecord | None]
    environment: NotRequired[Environment]


@with_config(STRICT)
class Moments(TypedDict):
    """Adam's state of one parameter."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@with_config(OPEN)
class OptimizerState(TypedDict):
    """Of Adam; what its groups say is not read, they follow from the settings."""

    state: dict[Count, Moments]


@with_config(STRICT)
class Images(TypedDict):
    """Which images a run trains on."""

    images: Count
    held_out: Count
    sha256: Text


def _counted(total: list[float]) -> list[float]:
    if total[1] < 1:
        raise ValueError("a sum of no values")
    return total


@with_config(STRICT)
class RunState(TypedDict):
    """state.pth. `position`: loop, stage, finished epochs of the stage, finished steps of the epoch."""

    config: Config
    base: Base | Annotated[dict, Field(max_length=0)]
    modules: dict[Text, State | None]
    optimizers: dict[StageName, OptimizerState]
    position: tuple[Annotated[int, Field(ge=1, le=MOST)], StageName, Count, Count]
    means: dict[Text, Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_counted)]]
    metrics: dict[StageName, dict[Text, float]]
    rng: Tensor
    clip_sha256: Text | None
    data: NotRequired[Images]


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def expect(kind: Any, content: object, path: Path) -> Any:
    """The content of a file, checked to be of a kind of this module. Raises ValueError that says what is not."""
    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = f"'{shorten('.'.join(str(part)[:120] for part in first['loc']), 120)}'"
        said = {"missing": "is missing", "extra_forbidden": "is not known to this version"}
        value, kind = first["input"], type(first["input"]).__name__
        shown = shorten(repr(value)[:200], 60) if isinstance(value, (str, int, float)) else "one"
        what = said.get(first["type"]) or f"{first['msg'].lower()}; found {shown} ({kind})"
        raise ValueError(f"{path}: {place} {what}.") from error
