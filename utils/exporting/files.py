"""ONNX files: a crash leaves the old one or the new one; weights of a large one lie beside it."""

import glob
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import onnx
from onnx.external_data_helper import uses_external_data

from dataset.files import LEFTOVER_SECONDS, naming, replace_file
from utils.exported import About, as_metadata

T = TypeVar("T")

# A file holds at most 2 GiB (https://protobuf.dev/programming-guides/proto-limits/); some room for the graph itself.
MOST_BYTES = 2**31 - 2**26
PRODUCER = "AA-CLIP with cross-attention"


def check_out(out: Path) -> None:
    """Raise ValueError where `out` is there and is no file of this program that may be replaced."""
    if not out.exists():
        return
    try:
        own = onnx.load(out, load_external_data=False).producer_name == PRODUCER
    except Exception:  # whatever a file of another kind makes the parser say
        own = False
    if not own:
        raise ValueError(f"--out {out}: is there already, and was not written by export.py. Choose another name.")


def write_graph(graph: onnx.ModelProto, about: About, out: Path, check: Callable[[Path], T]) -> tuple[list[Path], T]:
    """Write a graph with its metadata; the files, of which the second holds the weights of a large one.

    `check` sees the file before it takes its place, and may raise; what it returns is returned too. Raises
    onnx.checker.ValidationError where the graph is not valid ONNX.
    """
    graph.producer_name = PRODUCER
    onnx.helper.set_model_props(graph, as_metadata(about))
    _remove_leftovers(out)
    with naming(out), TemporaryDirectory(dir=out.parent, prefix=f"{_hidden(out)}.") as folder:
        written = Path(folder) / out.name
        save(graph, written)
        onnx.checker.check_model(written)
        checked = check(written)
        names = [*sorted(data_files(written)), out.name]
        for name in names:
            with open(Path(folder) / name, "rb+") as file:
                os.fsync(file.fileno())
        for name in names:
            replace_file(Path(folder) / name, out.parent / name)
    _remove_weights(out, names)
    return [out.parent / name for name in reversed(names)], checked


def _hidden(out: Path) -> str:
    return f".{out.stem}"


def _remove_leftovers(out: Path) -> None:
    """Remove folders that killed exports left, an hour ago or more."""
    for folder in out.parent.glob(f"{glob.escape(_hidden(out))}.*/"):
        if time.time() - folder.stat().st_mtime >= LEFTOVER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_weights(out: Path, names: Collection[str]) -> None:
    """Remove weights of earlier graphs of that name, all but those of `names`."""
    for path in out.parent.glob(f"{glob.escape(out.stem)}.*.data"):
        if re.fullmatch(r"[0-9a-f]{12}", path.name[len(out.stem) + 1 : -len(".data")]) and path.name not in names:
            with suppress(OSError):  # on Windows a program that runs the old graph holds it
                path.unlink()


def save(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph; the weights of a large one into a file of their own, named by its content.

    Thus an old graph never finds new weights.
    """
    if sum(len(tensor.raw_data) for tensor in graph.graph.initializer) <= MOST_BYTES:
        onnx.save_model(graph, path)
        return
    data = f"{path.stem}.{_sha256(graph)[:12]}.data"
    onnx.save_model(graph, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data)
    onnx.load_external_data_for_model(graph, str(path.parent))  # which saving has taken out of it


def data_files(path: Path) -> set[str]:
    """Names of the files beside a graph that hold its weights."""
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    tensors = [tensor for tensor in initializers if uses_external_data(tensor)]
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _sha256(graph: onnx.ModelProto) -> str:
    digest = hashlib.sha256()
    for tensor in graph.graph.initializer:
        digest.update(tensor.raw_data)
    return digest.hexdigest()
