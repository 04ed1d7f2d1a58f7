"""Exported models: ONNX files that hold all from pixels to a decision, run by ONNX Runtime. Known without PyTorch.

What a file is of stands in its metadata, each entry in JSON: see `About`.
"""

from utils.threads import WAIT_POLICY

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from dataset.images import reduced_for
from utils.calibration import Calibration
from utils.machine import is_cuda, own_processors
from utils.verdicts import ImageJudge, Judged

logger = logging.getLogger(__name__)

SUFFIX = ".onnx"
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

    `calibration` as in checkpoints, None where there is none; `threshold` is that of its probability. `clip_sha256` and
    `checkpoint_sha256` name the weights of CLIP and the checkpoint's file or files.
    """

    format: int
    name: str
    classes: list[str]
    prompts: dict[str, list[str]]
    domain: str
    img_size: int
    precision: str
    calibration: dict[str, Any] | None
    threshold: float | None
    clip_sha256: str | None
    checkpoint: str
    checkpoint_sha256: dict[str, str]


def is_exported(path: Path) -> bool:
    """Whether a path is that of an exported model, by its name."""
    return path.suffix.lower() == SUFFIX


def as_metadata(about: About) -> dict[str, str]:
    """The entries of a file's metadata."""
    return {name: json.dumps(value) for name, value in about.items()}


def from_metadata(entries: dict[str, str], path: Path) -> About:
    """What a file is of. Raises ValueError where it is not one of this program's, or of another version."""
    try:
        found = TypeAdapter(About).validate_python({name: json.loads(entries[name]) for name in About.__annotations__})
    except (KeyError, ValidationError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: not exported by this program: its metadata lack or garble "
            f"{shorten(str(error).splitlines()[0], 80)}. Expected a file that export.py wrote."
        ) from error
    if found["format"] != FORMAT:
        raise ValueError(f"{path}: exported in format {found['format']}; this version reads {FORMAT}. Export it anew.")
    return found


@dataclass(frozen=True, kw_only=True)
class ExportedDetector(ImageJudge):
    """An exported model that judges images of one class; `session` is ONNX Runtime's, `number` that of the class.

    None for a file of one class, which takes no number.
    """

    session: Any
    about: About
    number: int | None

    @property
    def img_size(self) -> int:
        return self.about["img_size"]

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
    provider = PROVIDERS["cuda" if device and is_cuda(device) else "cpu"]
    if device is not None and device.partition(":")[0] not in PROVIDERS:
        raise ValueError(f"--device {device}: an exported model runs on {' or '.join(PROVIDERS)}.")
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"--device {device}: this onnxruntime has no {provider}. Install onnxruntime-gpu, or use cpu.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or own_processors())
    if os.environ.get(WAIT_POLICY, "").upper() == "PASSIVE":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; what it warns of is for those who write runtimes
    try:
        return onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # its errors have no base of their own
        raise ValueError(f"{path}: not readable as an exported model ({shorten(str(error), 200)}).") from error


def load_exported(
    paths: Sequence[Path],
    class_name: str | None = None,
    domain: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    bits: int = 16,
    reduced_jpeg: bool = False,
    map_threshold: float | None = None,
) -> list[ExportedDetector]:
    """Detectors of exported models; the arguments as predict.py's flags of these names.

    Raises ValueError for a class or a domain that a file was not exported for.
    """
    found = []
    same = Counter(path.stem for path in paths)
    for path in paths:
        session = open_session(path, device, threads)
        about = from_metadata(session.get_modelmeta().custom_metadata_map, path)
        if domain is not None and domain != about["domain"]:
            raise ValueError(f"--domain {domain}: {path} was exported for {about['domain']} images.")
        calibration = None if about["calibration"] is None else Calibration(**about["calibration"])
        found.append(
            ExportedDetector(
                name=path.stem if same[path.stem] == 1 else str(path),
                session=session,
                about=about,
                number=_number(path, about["classes"], class_name),
                calibration=calibration,
                bits=bits,
                reduced_to=reduced_for(about["img_size"]) if reduced_jpeg else None,
                map_threshold=map_threshold,
            )
        )
    return found


def _number(path: Path, classes: list[str], class_name: str | None) -> int | None:
    if class_name is None and len(classes) == 1:
        logger.info("The prompts of %s say '%s'.", path, classes[0])
        return None
    if class_name not in classes:
        given = "without --class_name" if class_name is None else f"--class_name {class_name}"
        raise ValueError(f"{given}: {path} was exported for {', '.join(classes)}. Name one of these.")
    return classes.index(class_name) if len(classes) > 1 else None
