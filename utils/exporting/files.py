"""ONNX files: a crash leaves the old one or the new one; weights of a large one lie beside it."""

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx.external_data_helper import uses_external_data

from utils.exported import About, as_metadata, from_metadata

# A file holds at most 2 GiB (https://protobuf.dev/programming-guides/proto-limits/); some room for the graph itself.
MOST_BYTES = 2**31 - 2**26
PRODUCER = "AA-CLIP with cross-attention"


def check_out(out: Path) -> None:
    """Raise ValueError where `out` is there and is no file of this program that may be replaced."""
    if not out.exists():
        return
    words = "is there already, and was not written by export.py. Choose another name."
    try:
        found = onnx.load(out, load_external_data=False)
        from_metadata({entry.key: entry.value for entry in found.metadata_props}, out)
    except Exception as error:  # whatever a file of another kind makes the parser say
        raise ValueError(f"--out {out}: {words}") from error


def write_graph(graph: onnx.ModelProto, about: About, out: Path) -> list[Path]:
    """Write a graph with its metadata; the files, of which the second holds the weights of a large one.

    Raises onnx.checker.ValidationError where the graph is not valid ONNX.
    """
    graph.producer_name = PRODUCER
    onnx.helper.set_model_props(graph, as_metadata(about))
    before = data_files(out) if out.exists() else set()
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
        written = Path(folder) / out.name
        save(graph, written)
        onnx.checker.check_model(written)
        for name in [*sorted(data_files(written)), out.name]:
            os.replace(Path(folder) / name, out.parent / name)
    there = data_files(out)
    for name in before - there:
        (out.parent / name).unlink(missing_ok=True)
    return [out, *(out.parent / name for name in sorted(there))]


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
