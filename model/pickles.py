"""Archives of PyTorch, read without running anything: what `torch.save` and TorchScript write.

Both are zip files with one pickle, data.pkl, and the bytes of each storage beside it. A pickle may call whatever it
names, so it is not unpickled: its instructions are followed here, and what they name is built by this module or refused
(the instructions: `pickletools` of the standard library; the archive:
https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/docs/serialization.md).
"""

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
# What data may name, as in a pickle: module and name.
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
DICT, SIZE = "collections OrderedDict", "torch Size"
SAVED = {TENSOR, PARAMETER, DICT, SIZE, *(f"torch {name}" for name in STORAGES)}
# TorchScript names the types of its modules, which begin so, and functions that make typed lists of plain ones.
SCRIPTED, SCRIPTED_LISTS = "__torch__", "torch.jit._pickle "
# Instructions that put one thing on the stack, by what it is; others are explained where they are followed.
PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
WITH_VALUE = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
# Those that change nothing.
SILENT = {"PROTO", "FRAME", "STOP"}
# Instructions of a pickle, and values in a file, containers and tensors together; the state of a ViT-L/14 run has
# 10,000 and 500.
MOST = 200_000
# Containers within containers, and dimensions of a tensor.
DEEPEST = 100
# Letters of a name.
LONGEST = 1000
# Tensors may share a storage; all together they may be this many times as large as the file.
SHARED = 4
# Bytes that are read at a time.
CHUNK = 1 << 24


class Archive:
    """An archive, open for reading. Raises ValueError where the file is none, or holds more than its size."""

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError(what_else(path))
        self.zip = zipfile.ZipFile(path)
        self.size = path.stat().st_size
        self._names = set(self.zip.namelist())
        folders = [name.removesuffix("data.pkl") for name in self.zip.namelist() if name.endswith("/data.pkl")]
        if len(folders) != 1 or "/" in folders[0][:-1]:
            raise ValueError("no archive of torch.save: expected one data.pkl in one folder")
        self.folder = folders[0]
        self.is_scripted = any(name.startswith(f"{self.folder}code/") for name in self._names)
        self._check_entries()
        if f"{self.folder}byteorder" in self._names and self._read("byteorder") != b"little":
            raise ValueError("written on a machine with another order of bytes; save it on this one")
        self._storages: dict[str, Tensor] = {}

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *exception: object) -> None:
        self.zip.close()

    def _check_entries(self) -> None:
        """Raise ValueError where what is read is packed, there twice, or larger than the file."""
        read = ("data.pkl", "byteorder", "data/")
        entries = [entry for entry in self.zip.infolist() if entry.filename.removeprefix(self.folder).startswith(read)]
        expanded = sum(entry.file_size for entry in entries)
        packed = any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries)
        if packed or expanded > self.size:
            raise ValueError(f"expands from {self.size:,} to {expanded:,} bytes, which no file of PyTorch does")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two of its entries have one name")

    def _read(self, name: str) -> bytes:
        return self.zip.read(self.folder + name)

    def content(self) -> object:
        """What was saved, on the CPU: plain containers, numbers, texts and tensors; of TorchScript a `Module`.

        Raises ValueError for anything else, or what zip files and PyTorch raise for damaged ones.
        """
        content = _Reading(self).follow(self._read("data.pkl"))
        return content if isinstance(content, Module) else _checked(content, self.size)

    def storage(self, key: str, dtype: torch.dtype) -> Tensor:
        """All values of a storage, [N]. Raises ValueError where they are no whole number, or were of another type."""
        if key not in self._storages:
            if f"{self.folder}data/{key}" not in self._names:
                raise ValueError(f"storage {key} is missing")
            found = bytearray(self.zip.getinfo(f"{self.folder}data/{key}").file_size)
            if len(found) % dtype.itemsize:
                raise ValueError(f"storage {key} has {len(found):,} bytes, which are no values of {dtype}")
            with self.zip.open(f"{self.folder}data/{key}") as file:
                for start in range(0, len(found), CHUNK):
                    found[start : start + CHUNK] = file.read(CHUNK)
            self._storages[key] = torch.frombuffer(found, dtype=dtype) if found else torch.empty(0, dtype=dtype)
        if self._storages[key].dtype != dtype:
            raise ValueError(f"storage {key} is said to hold both {self._storages[key].dtype} and {dtype}")
        return self._storages[key]


def what_else(path: Path) -> str:
    """What is said of a file that is no archive, by how it begins."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        return "the file is empty"
    if start.startswith(b"PK"):
        return "the end of the archive is missing, as of a file cut short; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file it stands for; fetch that with: git lfs pull"
    if start.startswith(b"<"):
        return "a web page, not what was to be downloaded; download the file itself"
    if start.startswith(b"\x80"):
        return "no archive of torch.save but a pickle, as PyTorch before 1.6 wrote; load it there and save it anew"
    return "no archive of torch.save"


class Named(NamedTuple):
    """What a pickle names, which is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Module:
    """A module of TorchScript: its attributes, by their names."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


class _Reading:
    """Follows the instructions of a pickle, on a stack as `pickletools` explains them."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lay on the stack at each mark
        self.memo: dict[int, Any] = {}

    def follow(self, pickle: bytes) -> object:
        """What the pickle makes. Raises ValueError where it is damaged, or needs more than data does."""
        for number, (instruction, value, _) in enumerate(pickletools.genops(pickle)):
            if number > MOST:
                raise ValueError(f"more than {MOST:,} values")
            try:
                self._step(instruction.name, value)
            except (IndexError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"its pickle is damaged, at {instruction.name}") from error
        if len(self.stack) != 1 or self.below:
            raise ValueError("its pickle is damaged, at its end")
        return self.stack[0]

    def _step(self, instruction: str, value: Any) -> None:
        if instruction in WITH_VALUE:
            self.stack.append(value)
        elif instruction in PLAIN:
            self.stack.append(PLAIN[instruction])
        elif instruction in EMPTY:
            self.stack.append(EMPTY[instruction]())
        elif instruction in TUPLES:
            items = [self.stack.pop() for _ in range(TUPLES[instruction])]
            self.stack.append(tuple(reversed(items)))
        elif instruction == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif instruction in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if value is None else value] = self.stack[-1]
        elif instruction in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[value])
        elif instruction in ("TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._fill(instruction)
        elif instruction not in SILENT:
            self._make(instruction, value)

    def _fill(self, instruction: str) -> None:
        """A container gets what lies above the last mark, or the last one or two values."""
        if instruction in ("APPEND", "SETITEM"):
            count = 1 if instruction == "APPEND" else 2
            items = [self.stack.pop() for _ in range(count)][::-1]
        else:
            items, self.stack = self.stack, self.below.pop()
        if instruction == "TUPLE":
            self.stack.append(tuple(items))
            return
        container = self.stack[-1]
        if type(container) is not (list if instruction.startswith("APPEND") else dict):
            raise TypeError
        if isinstance(container, list):
            container.extend(items)
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bool, NoneType):  # a tuple of tuples may take ages to hash
                raise ValueError(f"a dictionary has {type(key).__name__} as a key; expected a text or a number")
            container[key] = value

    def _make(self, instruction: str, value: Any) -> None:
        """What needs a name: tensors, their storages, and modules of TorchScript."""
        if instruction in ("GLOBAL", "STACK_GLOBAL"):
            module, name = value.split(" ", 1) if value else (self.stack.pop(-2), self.stack.pop())
            self.stack.append(self._known(Named(_word(module), _word(name))))
        elif instruction == "BINPERSID":
            self.stack.append(self._storage(*_few(self.stack.pop())))
        elif instruction in ("NEWOBJ", "REDUCE"):
            arguments, named = _few(self.stack.pop()), self.stack.pop()
            self.stack.append(self._called(named, *arguments))
        elif instruction == "BUILD":
            state, built = self.stack.pop(), self.stack[-1]
            if isinstance(built, Module):
                if not isinstance(state, dict):
                    raise ValueError("a module of TorchScript that saves itself in its own way")
                built.attributes = state
            elif not isinstance(built, dict):  # an OrderedDict, as state dicts are, may have attributes: of no use here
                raise TypeError
        else:
            raise ValueError(f"its pickle has {instruction}, which plain tensors need not")

    def _known(self, named: Named) -> Named:
        """The same, where data may name it."""
        words = f"{named.module} {named.name}"
        scripted = named.module.split(".")[0] == SCRIPTED or words.startswith(SCRIPTED_LISTS)
        if words not in SAVED and not (scripted and self.archive.is_scripted):
            raise ValueError(
                f"it names {named}, which may run code and plain tensors need not; where the file is yours, save "
                "the tensors alone: torch.save(model.state_dict(), FILE)"
            )
        return named

    def _called(self, named: Named, *arguments: Any) -> Any:
        """What a pickle makes by calling what it names."""
        words = f"{named.module} {named.name}"
        if words == TENSOR:
            return _view(*arguments[:4])
        if words == PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        if words == DICT and not arguments:
            return {}
        if words == SIZE:
            return _few(*arguments)
        if named.module.split(".")[0] == SCRIPTED and not arguments:
            return Module()
        if words.startswith(SCRIPTED_LISTS):
            return arguments[0]
        raise TypeError

    def _storage(self, kind: str, named: Named, key: str, *_device_and_size: Any) -> Tensor:
        if kind != "storage" or named.module != "torch":
            raise TypeError
        return self.archive.storage(_word(key), STORAGES[named.name])


def _few(values: Any) -> tuple:
    """A tuple that is short, so that a pickle may use it many times."""
    if type(values) is not tuple or len(values) > DEEPEST:
        raise TypeError
    return values


def _word(value: Any) -> str:
    """A text that is short, for the same reason."""
    if type(value) is not str or len(value) > LONGEST:
        raise TypeError
    return value


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """A tensor in a storage. Raises ValueError where it lies beyond it, or repeats it."""
    numbers = (offset, *_few(size), *_few(stride))
    if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
        raise ValueError("a tensor with a shape that is none")
    count = 1
    for length in size:
        count *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if (count and last >= len(storage)) or count > len(storage):
        raise ValueError(f"a tensor of {count:,} values, with {len(storage):,} in its storage")
    return storage.as_strided(size, stride, offset)


def _checked(content: object, most_bytes: int) -> object:
    """The same, where it holds plain types and dense tensors alone that take no more memory than the file.

    Raises ValueError.
    """
    waiting, values, used = [(content, 0)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, Tensor):
            used += value.numel() * value.element_size()
        elif isinstance(value, (dict, list, tuple)) and not isinstance(value, Named):
            inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            waiting += ((item, depth + 1) for item in inside)
        elif not isinstance(value, (str, int, float, NoneType)):
            what = value if isinstance(value, Named) else type(value).__name__
            raise ValueError(f"it holds {what}; expected plain types and tensors")
        if values + len(waiting) > MOST or depth > DEEPEST:
            raise ValueError(f"more than {MOST:,} values, or {DEEPEST} containers within each other")
    if used > SHARED * most_bytes:
        raise ValueError(f"a file of {most_bytes:,} bytes with tensors of {used:,}")
    return content


def scripted_tensors(top: Module, most_bytes: int) -> dict[str, Tensor]:
    """State dict of a module that TorchScript saved: its tensors by the names of the attributes that lead to them.

    Raises ValueError where there are too many of them.
    """
    found = dict(_named_tensors(top))
    _checked(found, most_bytes)
    return found


def _named_tensors(top: Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a module and of those in it, with its dotted name."""
    waiting, seen = [("", top, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += len(module.attributes)
        if seen > MOST or depth > DEEPEST:
            raise ValueError(f"more than {MOST:,} attributes, or {DEEPEST} modules within each other")
        for name, value in module.attributes.items():
            if not isinstance(name, str) or len(prefix) + len(name) > LONGEST:
                raise ValueError("an attribute whose name is none")
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Module):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
