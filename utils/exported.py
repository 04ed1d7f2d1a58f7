"""Exported models: ONNX files that hold all from pixels to a decision, run by ONNX Runtime. Known without PyTorch.

What a file is of stands in its metadata, each entry in JSON: see `About`.
"""

from utils.threads import WAIT_POLICY

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from dataset.images import reduced_for
from utils.calibration import Calibration
from utils.machine import own_processors
from utils.verdicts import ImageJudge, Judged

logger = logging.getLogger(__name__)

# Of the metadata and of what goes in and out. A file of another one is refused.
FORMAT = 1
PIXELS, CLASS_NUMBER = "pixels", "class_number"
# What comes out of every file, in the order of `Judged`; where there is a calibration, DECIDED after it.
JUDGED, DECIDED = ("anomaly_map", "detection_score", "single_score"), ("probability", "decision")
# {PyTorch's name of a device: ONNX Runtime's of what computes on it}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
INSTALL = "pip install -r requirements/onnx.txt"


@with_config(ConfigDict(extra="ignore"))
class About(TypedDict):
    """The metadata of a file. `classes` are in the order of their numbers; `prompts` are theirs, normal ones first.

    `calibration` is None where the checkpoint has none; `threshold` is that of its probability. `clip_sha256` and
    `checkpoint_sha256` name the weights of CLIP and the checkpoint's file or files, which is called `checkpoint`.
    """

    format: int
    name: str
    classes: list[str]
    prompts: dict[str, list[str]]
    domain: str
    img_size: int
    precision: str
    calibration: Calibration | None
    threshold: float | None
    clip_sha256: str | None
    checkpoint: str
    checkpoint_sha256: dict[str, str]


def as_metadata(about: About) -> dict[str, str]:
    """The entries of a file's metadata."""
    return {name: json.dumps(value, default=asdict) for name, value in about.items()}


def from_metadata(entries: dict[str, str], path: Path) -> About:
    """What a file is of. Raises ValueError where it is not one of this program's, or of another version."""
    try:
        version = json.loads(entries["format"])
        if version != FORMAT:
            raise ValueError(f"{path}: exported in format {version}; this version reads {FORMAT}. Export it anew.")
        return TypeAdapter(About).validate_python({name: json.loads(entries[name]) for name in About.__annotations__})
    except (KeyError, ValidationError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: not exported by this program: its metadata lack or garble "
            f"{shorten(str(error).splitlines()[0], 80)}. Expected a file that export.py wrote."
        ) from error


@dataclass(frozen=True, kw_only=True)
class ExportedDetector(ImageJudge):
    """An exported model that judges images of one class; `session` is ONNX Runtime's, `number` that of the class.

    None for a file of one class, which takes no number.
    """

    session: Any
    about: About
    number: int | None

    @classmethod
    def load(
        cls,
        path: str | Path,
        class_name: str | None = None,
        domain: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        bits: int = 16,
        reduced_jpeg: bool = False,
        map_threshold: float | None = None,
    ) -> "ExportedDetector":
        """From a file; the rest as predict.py's flags of these names.

        Raises FileNotFoundError, or ValueError where the file is none of this program, or was exported for other
        classes or another domain.
        """
        path = Path(path)
        session = open_session(path, device, threads)
        about = from_metadata(session.get_modelmeta().custom_metadata_map, path)
        if domain is not None and domain != about["domain"]:
            raise ValueError(f"--domain {domain}: {path} was exported for {about['domain']} images.")
        return cls(
            name=path.name,
            session=session,
            about=about,
            number=_number(path, about["classes"], class_name),
            calibration=about["calibration"],
            bits=bits,
            reduced_to=reduced_for(about["img_size"]) if reduced_jpeg else None,
            map_threshold=map_threshold,
        )

    @property
    def img_size(self) -> int:
        return self.about["img_size"]

    @property
    def class_name(self) -> str:
        """What its images show."""
        return self.about["classes"][self.number or 0]

    def judge(self, pixels: np.ndarray) -> Judged:
        given = {PIXELS: pixels}
        if self.number is not None:
            given[CLASS_NUMBER] = np.full(len(pixels), self.number, dtype=np.int64)
        return Judged(*self.session.run(list(JUDGED), given))


def open_session(path: Path, device: str | None = None, threads: int | None = None) -> Any:
    """ONNX Runtime's session of a file; `device` and `threads` as the flags of these names.

    Raises FileNotFoundError, or ValueError where the file, or what lies beside it, cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{path}: exported models need onnxruntime ({error}). Install it: {INSTALL}") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, as seen from {Path.cwd()}. export.py writes one.")
    kind, _, number = (device or "cpu").partition(":")
    if kind not in PROVIDERS or not (number or "0").isdecimal():
        raise ValueError(f"--device {device}: an exported model runs on {' or '.join(PROVIDERS)}.")
    provider = PROVIDERS[kind]
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"--device {device}: this onnxruntime has no {provider}. Install onnxruntime-gpu, or use cpu.")
    options = onnxruntime.SessionOptions()
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list: of threads within threads
    options.intra_op_num_threads = threads or (int(told) if told.isdecimal() else own_processors())
    if os.environ.get(WAIT_POLICY, "").upper() == "PASSIVE":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; what it warns of is for those who write runtimes
    place = {"device_id": number} if number else {}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, place)])
    except Exception as error:  # its errors have no base of their own
        raise ValueError(f"{path}: not readable as an exported model ({shorten(str(error), 200)}).") from error
    if provider not in session.get_providers():  # it then goes on, slowly, where it can
        raise ValueError(f"--device {device}: {provider} does not work here; its libraries are missing. Use cpu.")
    return session


def load_exported(paths: Sequence[Path], *how: Any, **more: Any) -> list[ExportedDetector]:
    """`ExportedDetector.load` of several files, each once, with names that differ."""
    found = {path.resolve(): ExportedDetector.load(path, *how, **more) for path in paths}
    names = Counter(detector.name for detector in found.values())
    return [
        detector if names[detector.name] == 1 else replace(detector, name=str(path)) for path, detector in found.items()
    ]


def _number(path: Path, classes: list[str], class_name: str | None) -> int | None:
    if class_name is None and len(classes) == 1:
        return None
    if class_name not in classes:
        given = "without --class_name" if class_name is None else f"--class_name {class_name}"
        raise ValueError(f"{given}: {path} was exported for {', '.join(classes)}. Name one of these.")
    return classes.index(class_name) if len(classes) > 1 else None
