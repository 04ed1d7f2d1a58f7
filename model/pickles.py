"""Archives of PyTorch, read without running anything: what `torch.save` and TorchScript write.

Both are zip files with one pickle, data.pkl, and the bytes of each storage beside it. A pickle may call whatever it
names, so it is not unpickled: its instructions are followed here, and what they name is built by this module or refused
(the instructions: `pickletools` of the standard library; the archive:
https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/docs/serialization.md).
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# What else data may name. TorchScript names the types of its modules, and functions that make typed lists of others.
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
DICT, SIZE = "collections.OrderedDict", "torch.Size"
SCRIPTED, SCRIPTED_LISTS = "__torch__.", "torch.jit._pickle."

# The instructions that are followed, by what they do to the stack. Those that push a value:
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
# that make a tuple of the last ones, or fill a container with them, or with what lies above a mark:
TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
FILLING = {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None}
# that number the last one, or push what has a number:
PUT, GET = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET"}
# that make what needs a name:
NAMING = {"GLOBAL", "STACK_GLOBAL", "BINPERSID", "NEWOBJ", "REDUCE", "BUILD"}
# and those that change nothing.
SILENT = {"PROTO", "FRAME", "STOP"}
FOLLOWED = {*CONSTANTS, *VALUES, *EMPTY, *TUPLES, *FILLING, *PUT, *GET, *NAMING, *SILENT, "MARK"}

# Limits, so that few bytes cost little time and memory; in brackets what the state of a ViT-L/14 run has.
MOST_PICKLE_BYTES = 16_000_000  # (200,000)
MOST_INSTRUCTIONS = 200_000  # (15,000)
MOST_TENSORS = 20_000  # (1,000)
MOST_DIMENSIONS = 16  # (4)
MOST_ARGUMENTS = 16  # (7)
MOST_LETTERS = 500  # of a name (70)
DEEPEST = 100  # containers or modules within each other (6)
LARGEST_KEY = 2**53  # larger numbers may all have one hash
MOST_SHARED = 64  # times that all tensors are as large as the file, as those that share a storage may be (1)
# Bytes that are read at a time.
CHUNK = 1 << 24


def read_archive(path: Path) -> object:
    """What `torch.save` wrote, or the state dict of a module of TorchScript, on the CPU; nothing in the file is run.

    Plain containers, numbers, texts and dense tensors. Raises ValueError for anything else, or what zip files and
    PyTorch raise for damaged ones.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(not_weights(path) or _no_archive(path))
    with zipfile.ZipFile(path) as opened:
        archive = Archive(opened, path.stat().st_size)
        content = Reading(archive).follow(archive.read("data.pkl"))
    if isinstance(content, Module):
        content = dict(_named_tensors(content))
    _check(content, archive.size)
    return content


def not_weights(path: Path) -> str | None:
    """What is said of a file that came in the place of one with weights, by how it begins; None where it may be one."""
    start = _start(path).lstrip()
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file it stands for; fetch that with: git lfs pull"
    if start.startswith(b"<"):
        return "a web page, not what was to be downloaded; download the file itself"
    return None


def _no_archive(path: Path) -> str:
    """What is said of a file that is no archive."""
    start = _start(path)
    if start[8:9] == b"{":
        return "a file of safetensors, which of CLIP alone is read, where it is called so"
    if start.startswith(b"PK"):
        return "truncated: the end of the archive is missing; copy or download it again"
    if start.startswith(b"\x80"):
        return "no archive of torch.save but a pickle, as PyTorch before 1.6 wrote; load it there and save it anew"
    return "no archive of torch.save"


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


class Archive:
    """An open archive in a file of `size` bytes. Raises ValueError where it is none of PyTorch's."""

    def __init__(self, opened: zipfile.ZipFile, size: int):
        self.zip, self.size = opened, size
        folders = [name.removesuffix("data.pkl") for name in opened.namelist() if name.endswith("/data.pkl")]
        if len(folders) != 1 or "/" in folders[0][:-1]:
            raise ValueError("no archive of torch.save: expected one data.pkl in one folder")
        self.folder = folders[0]
        inside = [entry for entry in opened.infolist() if entry.filename.startswith(self.folder)]
        self.entries = {entry.filename.removeprefix(self.folder): entry for entry in inside}
        self.is_scripted = any(name.startswith("code/") for name in self.entries)
        self._check_entries(inside)
        if "byteorder" in self.entries and self.read("byteorder") != b"little":
            raise ValueError("written on a machine with another order of bytes; save it on this one")
        self._storages: dict[str, Tensor] = {}

    def _check_entries(self, inside: list[zipfile.ZipInfo]) -> None:
        """Raise ValueError where what is read is packed, there twice, or larger than the file."""
        names = tuple(self.folder + name for name in ("data.pkl", "byteorder", "data/"))
        read = [entry for entry in inside if entry.filename.startswith(names)]
        if len({entry.filename for entry in read}) < len(read):
            raise ValueError("two of its entries have one name")
        if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in read):
            raise ValueError("it is compressed, which no file of PyTorch is; save it anew")
        if (expanded := sum(entry.file_size for entry in read)) > self.size:
            raise ValueError(f"expands from {self.size:,} to {expanded:,} bytes, which no file of PyTorch does")
        if (length := self.entries["data.pkl"].file_size) > MOST_PICKLE_BYTES:
            raise ValueError(f"its pickle has {length:,} bytes, expected at most {MOST_PICKLE_BYTES:,}")

    def read(self, name: str) -> bytes:
        """The bytes of a small entry."""
        try:
            return self.zip.read(self.entries[name])
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"damaged, or written without checksums ({error}; torch.serialization.set_crc32_options switches them)"
            ) from error

    def storage(self, key: str, dtype: torch.dtype) -> Tensor:
        """All values of a storage, [N]. Raises ValueError where they are no whole number, or were of another type."""
        entry = self.entries.get(f"data/{key}")
        if entry is None:
            raise ValueError(f"storage {key} is missing")
        if key not in self._storages:
            if entry.file_size % dtype.itemsize:
                raise ValueError(f"storage {key} has {entry.file_size:,} bytes, which are no values of {dtype}")
            found = bytearray(entry.file_size)
            with self.zip.open(entry) as file:
                for start in range(0, len(found), CHUNK):
                    found[start : start + CHUNK] = file.read(CHUNK)
            self._storages[key] = torch.frombuffer(found, dtype=dtype) if found else torch.empty(0, dtype=dtype)
        if self._storages[key].dtype != dtype:
            raise ValueError(f"storage {key} is said to hold both {self._storages[key].dtype} and {dtype}")
        return self._storages[key]


class Named(NamedTuple):
    """What a pickle names, module and all, which is never looked up."""

    name: str

    @property
    def is_module(self) -> bool:
        """Whether this is the type of a module of TorchScript."""
        return self.name.startswith(SCRIPTED)

    @property
    def is_list(self) -> bool:
        """Whether this makes a list of TorchScript."""
        return self.name.startswith(SCRIPTED_LISTS)


class Module:
    """A module of TorchScript: its attributes, by their names."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


class Reading:
    """Follows the instructions of a pickle, on a stack as `pickletools` explains them."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lay on the stack at each mark
        self.memo: dict[int, Any] = {}
        self.tensors = 0

    def follow(self, pickle: bytes) -> object:
        """What the pickle makes. Raises ValueError where it is damaged, or needs more than data does."""
        for number, (instruction, value) in enumerate(_instructions(pickle)):
            if number >= MOST_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions")
            try:
                self._step(instruction, value)
            except (IndexError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"its pickle is damaged, at {instruction}") from error
        if len(self.stack) != 1 or self.below:
            raise ValueError("its pickle is damaged, at its end")
        return self.stack[0]

    def _step(self, instruction: str, value: Any) -> None:
        if instruction in VALUES:
            self.stack.append(value)
        elif instruction in CONSTANTS:
            self.stack.append(CONSTANTS[instruction])
        elif instruction in EMPTY:
            self.stack.append(EMPTY[instruction]())
        elif instruction in TUPLES:
            values = self._last(TUPLES[instruction])
            self.stack.append(tuple(values))
        elif instruction in FILLING:
            self._fill(instruction, self._last(FILLING[instruction]))
        elif instruction == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif instruction in PUT:
            self.memo[len(self.memo) if value is None else value] = self.stack[-1]
        elif instruction in GET:
            self.stack.append(self.memo[value])
        elif instruction in NAMING:
            self._make(instruction, value)

    def _last(self, count: int | None) -> list[Any]:
        """The last values, taken from the stack: `count`, or all above the last mark."""
        if count is None:
            values, self.stack = self.stack, self.below.pop()
            return values
        return [self.stack.pop() for _ in range(count)][::-1]

    def _fill(self, instruction: str, values: list[Any]) -> None:
        """The list or dictionary on the stack takes in values, or keys and values in turn."""
        container = self.stack[-1]
        if type(container) is not (list if instruction.startswith("APPEND") else dict):
            raise TypeError
        if isinstance(container, list):
            container += values
            return
        for key, value in zip(values[::2], values[1::2], strict=True):
            container[_key(key)] = value

    def _make(self, instruction: str, value: Any) -> None:
        if instruction == "GLOBAL":
            self.stack.append(self._known(value.replace(" ", ".", 1)))
        elif instruction == "STACK_GLOBAL":
            module, name = self._last(2)
            self.stack.append(self._known(f"{_word(module)}.{_word(name)}"))
        elif instruction == "BINPERSID":
            self.stack.append(self._storage(*_few(self.stack.pop(), MOST_ARGUMENTS)))
        elif instruction == "BUILD":
            self._build(self.stack.pop(), self.stack[-1])
        else:  # a call, which NEWOBJ and REDUCE write in the same way
            named, arguments = self._last(2)
            self.stack.append(self._called(named, *_few(arguments, MOST_ARGUMENTS)))

    def _known(self, name: str) -> Named:
        """What data may name."""
        named = Named(_word(name))
        scripted = self.archive.is_scripted and (named.is_module or named.is_list)
        if not scripted and name not in STORAGES and name not in (TENSOR, PARAMETER, DICT, SIZE):
            cure = "of a model the tensors alone, its state_dict()"
            if name.startswith("numpy"):
                cure = "NumPy's numbers and arrays as int, float and torch.Tensor"
            raise ValueError(
                f"it names {name}, which may run code and plain tensors need not; where the file is yours, save {cure}"
            )
        return named

    def _called(self, named: Named, *arguments: Any) -> Any:
        """What a pickle makes by calling what it names."""
        if named.name == TENSOR:
            self.tensors += 1
            if self.tensors > MOST_TENSORS:
                raise ValueError(f"more than {MOST_TENSORS:,} tensors")
            return _view(*arguments)
        if named.name == PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        if named.name == DICT and not arguments:
            return {}  # which keeps its order as well
        if named.name == SIZE and len(arguments) == 1:
            return _few(arguments[0], MOST_DIMENSIONS)
        if named.is_module and not arguments:
            return Module()
        if named.is_list:
            return arguments[0]
        raise TypeError

    def _build(self, state: Any, built: Any) -> None:
        """What was just made gets its state."""
        if isinstance(built, Module):
            if not isinstance(state, dict):
                raise ValueError("a module of TorchScript that saves itself in its own way")
            built.attributes = state
        elif not isinstance(built, dict):  # an OrderedDict, as state dicts are, may have attributes: of no use here
            raise TypeError

    def _storage(self, kind: str, named: Named, key: str, *_device_and_size: Any) -> Tensor:
        if kind != "storage":
            raise TypeError
        return self.archive.storage(_word(key), STORAGES[named.name])


def _instructions(pickle: bytes) -> Iterator[tuple[str, Any]]:
    """The instructions of a pickle up to its end, by their names and with their arguments.

    Raises ValueError for one that is not followed, before its argument is looked at.
    """
    file, instruction = io.BytesIO(pickle), None
    while instruction is None or instruction.name != "STOP":
        code = file.read(1).decode("latin-1")
        instruction = CODES.get(code)
        if instruction is None or instruction.name not in FOLLOWED:
            what = instruction.name if instruction else f"{code!r} for an instruction" if code else "no end"
            raise ValueError(f"its pickle has {what}, which plain tensors need not")
        yield instruction.name, instruction.arg.reader(file) if instruction.arg else None


CODES = {instruction.code: instruction for instruction in pickletools.opcodes}


def _few(values: Any, most: int) -> tuple:
    """A tuple that is short, so that a pickle may use it many times."""
    if type(values) is not tuple or len(values) > most:
        raise TypeError
    return values


def _word(value: Any) -> str:
    """A text that is short, for the same reason."""
    if type(value) is not str or len(value) > MOST_LETTERS:
        raise TypeError
    return value


def _key(value: Any) -> Any:
    """A key of a dictionary whose hash takes no time, and is no other's."""
    plain = type(value) in (str, bool, NoneType) or (type(value) is int and abs(value) < LARGEST_KEY)
    if not plain:
        raise ValueError(f"a dictionary has a key of the type {type(value).__name__}; expected texts or small numbers")
    return value


def _view(
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool = False,
    _hooks: object = None,
    more: dict | None = None,
) -> Tensor:
    """A tensor in a storage. Raises ValueError where it lies beyond it, or is stored as something else than it is."""
    if more:
        raise ValueError(f"a tensor that is stored as {', '.join(map(str, more))}; save a .clone() of it")
    numbers = (offset, *_few(size, MOST_DIMENSIONS), *_few(stride, MOST_DIMENSIONS))
    if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
        raise ValueError(f"a tensor of the shape {size} and the strides {stride}"[:200])
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise ValueError(f"a tensor that needs {last + 1:,} values, with {len(storage):,} in its storage"[:200])
    return storage.as_strided(size, stride, offset)


def _check(content: object, most_bytes: int) -> None:
    """Raise ValueError for anything but plain types and tensors, and for more of them than a file of that size has."""
    waiting, values, used = [(content, 0)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, Tensor):
            used += value.numel() * value.element_size()
        elif isinstance(value, (dict, list, tuple)) and not isinstance(value, Named):
            waiting += ((item, depth + 1) for item in value)
            waiting += ((item, depth + 1) for item in value.values()) if isinstance(value, dict) else ()
        elif not isinstance(value, (str, int, float, NoneType)):
            what = value.name if isinstance(value, Named) else "a part of TorchScript"
            raise ValueError(f"it holds {what}; expected plain types and tensors")
        if values + len(waiting) > MOST_INSTRUCTIONS:
            raise ValueError(f"it holds more than {MOST_INSTRUCTIONS:,} values")
        if depth > DEEPEST:
            raise ValueError(f"it holds {DEEPEST} containers within each other")
    if used > MOST_SHARED * most_bytes:
        raise ValueError(f"a file of {most_bytes:,} bytes with tensors of {used:,}")


def _named_tensors(top: Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a module of TorchScript and of those in it, with its dotted name, as in a state dict.

    Raises ValueError where there are too many of them.
    """
    waiting, seen = [("", top, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"it holds {DEEPEST} modules within each other")
        seen += len(module.attributes)
        if seen > MOST_TENSORS:
            raise ValueError(f"its modules have more than {MOST_TENSORS:,} attributes")
        for name, value in module.attributes.items():
            if not isinstance(name, str) or len(prefix) + len(name) > MOST_LETTERS:
                raise ValueError(f"an attribute whose name is none, or has more than {MOST_LETTERS} letters")
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Module):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
