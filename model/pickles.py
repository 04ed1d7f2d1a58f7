"""Archives of PyTorch, their pickles read without running anything: what `torch.save` and TorchScript write.

Both are zip files with one pickle, data.pkl, and the bytes of each storage beside it. A pickle can call whatever it
names, so its instructions are looked through before any is followed (the format: `pickletools` of the standard library;
the archive: https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/docs/serialization.md).
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What tensors in plain containers need. Others would let a few bytes ask for any amount of memory.
INSTRUCTIONS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS"),
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What a file of `torch.save` may name, as in a pickle: module and name.
SAVED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in STORAGES),
}
# TorchScript: the types of its modules begin so; they are read as bare attributes.
SCRIPTED = "__torch__"
# Modules within modules, and their attributes, in one archive; ViT-L/14 has 2,500.
MOST_ATTRIBUTES = 100_000


class Archive:
    """An archive, open for reading. Raises ValueError where the file is none, or holds more than its size."""

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError("no archive of torch.save; files from before PyTorch 1.6 are to be saved anew")
        self.zip = zipfile.ZipFile(path)
        entries = {entry.filename: entry for entry in self.zip.infolist()}
        # PyTorch compresses nothing, so an archive is larger than what is in it.
        expanded, size = sum(entry.file_size for entry in entries.values()), path.stat().st_size
        if expanded > size:
            raise ValueError(f"expands from {size:,} to {expanded:,} bytes, which no file of PyTorch does")
        folders = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(folders) != 1 or "/" in folders[0][:-1]:
            raise ValueError("no archive of torch.save: expected one data.pkl in one folder")
        self.folder = folders[0]
        self.is_scripted = any(name.startswith(f"{self.folder}code/") for name in entries)

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *exception: object) -> None:
        self.zip.close()

    def read(self, name: str) -> bytes:
        """The bytes of an entry of the archive's folder."""
        return self.zip.read(self.folder + name)

    def check_pickle(self) -> bytes:
        """The archive's pickle. Raises ValueError where it has an instruction, or names a thing, that data need not."""
        data = self.read("data.pkl")
        for instruction, value, _ in pickletools.genops(data):
            argument: Any = value
            if instruction.name not in INSTRUCTIONS:
                raise ValueError(f"its pickle has {instruction.name}, which plain tensors need not")
            if instruction.name == "LONG_BINPUT" and argument > len(data):
                raise ValueError("its pickle numbers more things than it holds")
            if instruction.name == "GLOBAL" and not self._is_plain(argument):
                raise ValueError(
                    f"it names {argument.replace(' ', '.')}, which may run code and plain tensors need not"
                )
        return data

    def _is_plain(self, name: str) -> bool:
        """Whether what a pickle names, "module name", is data's."""
        of_module = name.partition(" ")[0].split(".")[0] == SCRIPTED or name.startswith("torch.jit._pickle ")
        return name in SAVED or (self.is_scripted and of_module)


class _View(NamedTuple):
    """A tensor before its bytes are looked at."""

    storage: "_Storage"
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Attributes:
    """A module of TorchScript: what its pickle says of it, whatever its own __setstate__ would do."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _view(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: object) -> _View:
    return _View(storage, offset, size, stride)


def _list(values: list, *_: object) -> list:
    return values


class _Unpickler(pickle.Unpickler):
    """Follows a pickle that `Archive.check_pickle` let through; classes and functions in it are ours."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == SCRIPTED:
            return _Attributes
        if module == "torch.jit._pickle":
            return _list
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {"_rebuild_tensor_v2": _view, "OrderedDict": OrderedDict}
        if name not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in TorchScript")
        return known[name]

    def persistent_load(self, about: tuple) -> _Storage:
        _, dtype, key, *_ = about
        return _Storage(dtype, key)


def scripted_tensors(archive: Archive) -> dict[str, Tensor]:
    """State dict of the module that TorchScript saved: its tensors by the names of the attributes that lead to them.

    Raises ValueError or RuntimeError for an archive of anything else.
    """
    top = _Unpickler(io.BytesIO(archive.check_pickle())).load()
    storages: dict[_Storage, Tensor] = {}
    found = {}
    for name, view in _named_views(top):
        if view.storage not in storages:
            data = bytearray(archive.read(f"data/{view.storage.key}"))
            dtype = view.storage.dtype
            storages[view.storage] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        found[name] = storages[view.storage].as_strided(view.size, view.stride, view.offset)
    return found


def _named_views(top: object) -> Iterator[tuple[str, _View]]:
    """Every tensor of a module and of those in it, with its dotted name."""
    waiting, seen = [("", top)], 0
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module, _Attributes) or not isinstance(module.state, dict):
            raise ValueError(f"expected a module of TorchScript with attributes, found {type(module).__name__}")
        seen += len(module.state)
        if seen > MOST_ATTRIBUTES:
            raise ValueError(f"more than {MOST_ATTRIBUTES:,} attributes")
        for name, value in module.state.items():
            if isinstance(value, _View):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Attributes):
                waiting.append((f"{prefix}{name}.", value))
