"""Files that are broken or hostile: refused in one sentence, and nothing in them is run."""

import copy
import io
import os
import pickle
import resource
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from benchmarks.standin import Scripted
from dataset.images import one_large, read_defect, read_image, size_on_disk
from dataset.layouts import visa
from dataset.records import Record, check_paths, read_records
from dataset.sets import open_dataset
from model.backbone import load_backbone
from model.pickles import read_archive
from model.weights import read_weights
from tests.conftest import EPOCHS, write_small_dataset
from utils.checkpoints import load_checkpoint
from utils.models import ModelLoader

# weights


class Attack(torch.nn.Module):
    """Writes a file when it is loaded by TorchScript."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save(torch.zeros(1), "harmed")
        self.weight = state[0]
        self.training = state[1]

    def forward(self, x):
        return x


class Call:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_weight_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    torch.jit.script(Attack()).save("ckpt/demo.pt")
    with open("pickled.pt", "wb") as file:
        pickle.dump(Call(tmp_path / "harmed"), file)
    torch.save({"a": Call(tmp_path / "harmed")}, "saved.pt")
    for path in ("ckpt/demo.pt", "pickled.pt", "saved.pt"):
        with pytest.raises(ValueError, match=f"{path}: not readable as CLIP weights"):
            load_backbone("demo", clip_weights=path)
        with pytest.raises(ValueError, match=r"not readable as a checkpoint|expected a loop file"):
            load_checkpoint(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "pickled.pt", "saved.pt"]


def test_what_torchscript_holds_is_read_as_it_loads_it(tmp_path):
    state = {
        "a.b": torch.randn(3, 4).half(),
        "a.c.d": torch.randn(5, 2).t(),
        "e": torch.zeros(0),
        "f": torch.tensor(2.5).double(),
        "g": torch.randn(4, 4)[1:3, ::2],
    }
    torch.jit.script(Scripted(state)).save(tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())


def test_a_traced_clip_is_read_whatever_code_its_archive_brings(backbone, tmp_path):
    pixels = torch.zeros(1, 3, backbone.img_size, backbone.img_size)
    clip = copy.deepcopy(backbone.clip)
    clip.transformer.resblocks[0].attn_mask = torch.full((3, 3), -torch.inf)  # as OpenAI's blocks have it
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace_module(clip, {"encode_image": pixels}, check_trace=False)
    traced.save(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert any(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())
    assert load_backbone("demo", clip_weights=tmp_path / "x.pt").sha256 == backbone.sha256


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_saves_is_read_as_torch_loads_it(tmp_path, protocol):
    tied = torch.randn(30)
    content = {
        "tied": [*[tied] * 20, tied[3:9], tied[:3].expand(4, 3), tied.view(5, 6).t(), tied[:0], tied[4]],
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "numbers": (1, -(2**40), 2**70, 2.5, None, True),
        "size": tied.shape,
        1: torch.nn.Linear(2, 2).state_dict(),
        "text": "\u00e4" * 300,
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    found = read_archive(tmp_path / "x.pt")
    torch.save(content, tmp_path / "x.pt")  # PyTorch itself reads its own protocol alone
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(found.pop("tied"), loaded.pop("tied"), strict=True))
    assert all(torch.equal(found[1][name], value) for name, value in loaded.pop(1).items()) and found.pop(1)
    assert torch.equal(found.pop("parameter"), loaded.pop("parameter"))
    assert torch.equal(found.pop("last"), loaded.pop("last"))
    assert found == loaded


@pytest.mark.parametrize("tensor", [torch.randn(3, dtype=torch.cfloat).conj().imag, torch._neg_view(torch.ones(2))])
def test_a_tensor_that_is_stored_as_its_negative_is_not_read_as_that(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="stored as neg; save a"):
        read_weights(tmp_path / "x.pt")


def test_weights_are_finite_and_named_once(tmp_path):
    torch.save({"a": torch.tensor([1, torch.inf])}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="'a' holds numbers that are not finite"):
        read_weights(tmp_path / "x.pt")
    torch.save({"a": torch.ones(1), "module.a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="with and without"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>" + bytes(90), "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"", "empty"),
    ],
)
def test_what_is_no_file_of_safetensors_is_said(tmp_path, content, message):
    (tmp_path / "x.SafeTensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "x.SafeTensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="a file of safetensors"):
        load_checkpoint(tmp_path / "x.pth")


def claim(path: Path, shape: tuple, stride: tuple, numel: int = 1) -> None:
    """A file of torch.save of a few bytes whose tensor claims any shape."""
    torch.save({"a": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("data.pkl"))

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    sizes = b"(" + b"".join(map(number, shape)) + b"t"
    strides = b"(" + b"".join(map(number, stride)) + b"t"
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(numel) + b"tQ"
    )
    entries[name] = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(0)
        + sizes
        + strides
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


@pytest.mark.parametrize(
    ("shape", "stride", "numel"),
    [((10**6, 10**6), (0, 0), 1), ((2**31 - 1,), (1,), 2**31 - 1), ((4,), (1,), 1), ((2, 2), (-1, 1), 4)],
)
def test_a_tensor_takes_no_more_memory_than_its_file(tmp_path, shape, stride, numel):
    claim(tmp_path / "x.pt", shape, stride, numel)
    started = time.monotonic()
    with pytest.raises(ValueError, match="not readable as CLIP weights"):
        read_weights(tmp_path / "x.pt")
    assert time.monotonic() - started < 2


def pickled(path: Path, instructions: bytes, *more: tuple[str, bytes]) -> None:
    """An archive of torch.save with a pickle of these instructions and more entries, (name, data)."""
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:  # of names that are twice
        for name, data in (("data.pkl", b"\x80\x02" + instructions + b"."), *more):
            archive.writestr(f"x/{name}", data)


def packed(path: Path, method: int, says: int | None = None) -> None:
    """Entries that are compressed, which say that they hold `says` bytes."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", bytes(10**8))
        for entry in archive.infolist():
            entry.file_size = says or entry.file_size


def storage(kind: bytes, key: bytes = b"0") -> bytes:
    """Instructions that give a storage."""
    return b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpuJ\xff\xff\xff\x7ftQ"


def damaged(path: Path) -> None:
    """One bit of a tensor is another one."""
    torch.save({"a": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(500.0, 600.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def tensor(size: bytes) -> bytes:
    """Instructions that give a tensor in storage 0, its strides as its size; what it is called with is number 4."""
    made = b"ctorch._utils\n_rebuild_tensor_v2\nq\x03(" + storage(b"FloatStorage") + b"K\0" + size + size
    return made + b"\x89Ntq\x04R"


def collision(number: int) -> bytes:
    """A whole number whose hash in Python is 0."""
    return b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little")


PLAIN = b"}X\x01\0\0\0aK\x01s"
# Every one is small, and harmless where it is refused or read for what it is.
HOSTILE = {
    "compressed": (lambda path: packed(path, zipfile.ZIP_DEFLATED), "it is compressed"),
    "compressed, with another size": (lambda path: packed(path, zipfile.ZIP_BZIP2, 9), "it is compressed"),
    "the same of LZMA": (lambda path: packed(path, zipfile.ZIP_LZMA, 9), "it is compressed"),
    "a table of 2^32": (lambda path: pickled(path, b"}r\xff\xff\xff\xff"), "lacks"),
    "100 GB of zeros": (
        lambda path: pickled(path, b"c__builtin__\nbytearray\n\x8a\x06\0\0\0\x4a\x17\0\x85R"),
        "names __builtin__.bytearray",
    ),
    "a key of 2^200 tuples": (
        lambda path: pickled(path, b"})" + b"q\x01h\x01\x86" * 200 + b"K\x01s"),
        "a key of the type tuple",
    ),
    "a name of 2^200 tuples": (
        lambda path: pickled(path, b"})" + b"q\x01h\x01\x86" * 200 + b"X\x01\0\0\0a\x93"),
        "damaged, at STACK_GLOBAL",
    ),
    "a storage of 2^200 tuples": (
        lambda path: pickled(
            path,
            b"(X\x07\0\0\0storagectorch\nFloatStorage\n)" + b"q\x01h\x01\x86" * 200 + b"X\x03\0\0\0cpuK\x01tQ",
        ),
        "damaged, at BINPERSID",
    ),
    "keys of one hash": (
        lambda path: pickled(path, b"}(" + b"".join(collision(n) + b"N" for n in range(1, 20_000)) + b"u"),
        "a key of the type int",
    ),
    "a key that is no whole number": (lambda path: pickled(path, b"}G" + bytes(8) + b"Ns"), "a key of the type float"),
    "a text instruction of 10 MB": (
        lambda path: pickled(path, b"S" + b"\x01" * 10**7 + b"\n"),
        "its pickle has STRING",
    ),
    "a text of 20 MB": (
        lambda path: pickled(path, b"X" + struct.pack("<I", 2 * 10**7) + b"a" * 2 * 10**7),
        "expected at most",
    ),
    "a name of a million letters": (
        lambda path: pickled(path, b"}X" + struct.pack("<I", 10**6) + b"\xc3\xa9" * (10**6 // 2) + b"K\x01s"),
        "is int",
    ),
    "a tensor of 50 dimensions": (
        lambda path: pickled(path, tensor(b"(" + b"K\x01" * 50 + b"t"), ("data/0", bytes(4))),
        "damaged, at REDUCE",
    ),
    "50,000 tensors": (
        lambda path: pickled(
            path,
            b"](" + tensor(b"K\x01\x85") + b"h\x03h\x04R" * 50_000 + b"e",
            ("data/0", bytes(4)),
        ),
        "more than 20,000 tensors",
    ),
    "letters of names": (
        lambda path: pickled(
            path,
            b"c__torch__\nA\n)\x81}(" + b"".join(b"X\x06\0\0\0%06dN" % n for n in range(60_000)) + b"ub",
            ("code/a.py", b""),
        ),
        "more than 20,000 attributes",
    ),
    "2^90 values": (lambda path: pickled(path, b"]" + b"q\x01h\x01\x86" * 90), "more than 200,000 values"),
    "tuples within tuples": (lambda path: pickled(path, b")" + b"\x85" * 2_000_000), "more than 200,000 instructions"),
    "a thousand tuples": (lambda path: pickled(path, b")" + b"\x85" * 1000), "100 containers within each other"),
    "a list in itself": (lambda path: pickled(path, b"]q\x01h\x01a"), "100 containers within each other"),
    "another pickle before it": (
        lambda path: path.write_bytes(pickle.dumps([0] * 10**6) + saved({"a": 1})),
        "'a' is int",
    ),
    "another archive before it": (lambda path: path.write_bytes(saved([]) + saved({"a": 1})), "'a' is int"),
    "two pickles": (lambda path: pickled(path, PLAIN, ("data.pkl", b"\x80\x02].")), "expected one data.pkl"),
    "two storages of one name": (lambda path: pickled(path, PLAIN, *[("data/0", b"")] * 2), "have one name"),
    "a storage of two kinds": (
        lambda path: pickled(
            path, b"](" + storage(b"FloatStorage") + storage(b"IntStorage") + b"e", ("data/0", bytes(8))
        ),
        "storage 0 is said to hold both",
    ),
    "half a number": (
        lambda path: pickled(path, storage(b"FloatStorage"), ("data/0", bytes(6))),
        "which are no values",
    ),
    "no storage": (lambda path: pickled(path, storage(b"FloatStorage")), "storage 0 is missing"),
    "another bit": (damaged, "CRC"),
    "a module in itself": (
        lambda path: pickled(
            path, b"c__torch__\nA\n)\x81q\x01}X\x01\0\0\0mh\x01sb", ("code/a.py", b""), ("byteorder", b"little")
        ),
        "100 modules within each other",
    ),
    "an attribute of a function": (
        lambda path: pickled(path, b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb"),
        "damaged, at BUILD",
    ),
    "a dictionary of pairs": (
        lambda path: pickled(path, b"ccollections\nOrderedDict\n])\x85R"),
        "damaged, at REDUCE",
    ),
    "a size of a million": (
        lambda path: pickled(path, b"ctorch\nSize\n(" + b"K\x01" * 100_000 + b"t\x85R"),
        "damaged, at REDUCE",
    ),
    "an empty stack": (lambda path: pickled(path, b"0"), "which plain tensors need not"),
    "a mark left": (lambda path: pickled(path, b"(}"), "damaged, at its end"),
    "another order of bytes": (lambda path: pickled(path, PLAIN, ("byteorder", b"big")), "another order of bytes"),
    "nothing": (lambda path: path.write_bytes(b""), "the file is empty"),
    "cut short": (
        lambda path: path.write_bytes(saved({"a": torch.zeros(9)})[:300]),
        "the end of the archive is missing",
    ),
    "a web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html>"), "a web page"),
    "a pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
}


def saved(content: object) -> bytes:
    """A file of torch.save."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_cost_no_time_and_no_memory(tmp_path, kind):
    write, message = HOSTILE[kind]
    write(tmp_path / "x.pt")
    assert message in said_within_limits(lambda: load_backbone("demo", clip_weights=tmp_path / "x.pt"))


def said_within_limits(call: Callable[[], object]) -> str:
    """The ValueError of a call that is made in a process of its own, with 2 s of the processor and 400 MB more."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400 * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
        said = "no error"
        try:
            call()
        except ValueError as error:
            said = str(error)
        except BaseException as error:
            said = repr(error)
        os.write(sender, said.encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, encoding="utf-8") as file:
        said = file.read()
    assert os.waitpid(child, 0)[1] == 0, "ended by a signal"
    return said


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(torch.zeros(1), path, _use_new_zipfile_serialization=False), "PyTorch before 1.6"),
        (lambda path: torch.save([{}] * 3, path), "expected a state dict of tensors, found list"),
        (lambda path: torch.save({"a": 1}, path), "'a' is int"),
        (lambda path: torch.save({"a": torch.zeros(2, dtype=torch.int32)}, path), "'a' holds torch.int32"),
        (lambda path: torch.save({"a": torch.zeros(2, 2).to_sparse()}, path), "it names torch._utils._rebuild_sparse"),
        (lambda path: torch.save({"a": torch.zeros(2, device="meta")}, path), "it names torch._utils._rebuild_meta"),
        (lambda path: torch.save({"a": np.float64(1)}, path), "NumPy's numbers and arrays as int, float"),
    ],
)
def test_weights_of_another_kind_are_named(tmp_path, write, message):
    write(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2), (1, 128), (7, 128), (65, 3), (0, 128)])
def test_positions_of_another_shape_are_refused(backbone, tmp_path, shape):
    state = backbone.clip.state_dict() | {"visual.positional_embedding": torch.zeros(shape)}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"'visual.positional_embedding' of shape"):
        load_backbone("demo", clip_weights=tmp_path / "x.safetensors")


def test_only_the_positions_of_images_may_have_another_shape(backbone, tmp_path):
    state = backbone.clip.state_dict() | {"positional_embedding": torch.zeros(3)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"'positional_embedding' of another size: shape \[3\]"):
        load_backbone("demo", clip_weights=tmp_path / "x.pt")


# checkpoints


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("config.training.seed", "3", "'config.training.seed' input should be a valid integer; found '3'"),
        ("config.training.text_epoch", [], "'config.training.text_epoch'"),
        ("config.training.shape", 1, "'config.training.shape' is not known to this version"),
        ("config.model.img_size", 8000, "--img_size 8000: expected at most 4096 px"),
        ("config.model.model_name", "hf-hub:someone/something", "open_clip has no such model"),
        ("config.model.adapter_hidden", 10**9, "less than or equal to 65536"),
        ("config.model.adapter_hidden", 512, "config says adapter_hidden 512, its tensors have None"),
        ("config.model.cross_attn", "elsewhere", "'config.model.cross_attn'"),
        ("base.datasets", "VisA", "'base.datasets' input should be a valid list"),
        ("base", None, "'base'"),
        ("calibration.threshold", "0.5", "'calibration.threshold'"),
        ("calibration.threshold", float("nan"), "'calibration.threshold'"),
        ("calibration.map_range", (1.0,), "'calibration.map_range"),
        ("loop", -1, "'loop'"),
        ("text_adapter", [torch.zeros(1)], "'text_adapter'"),
        ("text_adapter.0*fc*0*weight", torch.zeros(3), "of another size|expected a matrix"),
        ("text_adapter.0*fc*0*weight", torch.zeros(48, 48, dtype=torch.int64), "holds torch.int64"),
        ("image_cross_attn", torch.zeros(1), "'image_cross_attn'"),
        ("environment.clip_sha256", 5, "'environment.clip_sha256'"),
    ],
)
def test_what_a_loop_file_holds_is_checked(run, tmp_path, backbone, place, value, message):
    content = torch.load(run / "loop_1.pth", weights_only=True)
    *path, last = (part.replace("*", ".") for part in place.split("."))
    inside = content
    for part in path:
        inside = inside[part]
    inside[last] = value
    torch.save(content, tmp_path / "loop_1.pth")
    with pytest.raises(ValueError, match=message):
        ModelLoader(torch.device("cpu"), backbone=backbone)(load_checkpoint(tmp_path / "loop_1.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(position=(1, "text", -1, 0)), "'position.2'"),
        (lambda s: s.update(position=(1, "third", 0, 0)), "'position.1'"),
        (lambda s: s.update(position=(2, "text", 0, 9)), "no state that this run comes to"),
        (lambda s: s.update(position=(2, "text", 9, 0)), "no state that this run comes to"),
        (lambda s: s.update(rng=torch.zeros(5, dtype=torch.uint8)), "no state that this run comes to"),
        (lambda s: s.update(modules={}), "no state that this run comes to"),
        (lambda s: s["modules"].update(text_adapter={"x": torch.zeros(1)}), "'text_adapter' lacks"),
        (lambda s: s.update(means={"loss": [1.0, 0]}), "a sum of no values"),
        (lambda s: s["optimizers"]["text"]["state"].update(a=1), "'optimizers.text.state"),
        (lambda s: s.pop("clip_sha256"), "'clip_sha256' is missing"),
        (lambda s: s.update(more=1), "'more' is not known"),
    ],
)
def test_what_a_state_holds_is_checked(scripts, base, run, tmp_path, capsys, change, message):
    folder = tmp_path / "run"
    folder.mkdir()
    state = torch.load(run / "state.pth", weights_only=True)
    state["position"] = (2, "text", 0, 0)
    change(state)
    torch.save(state, folder / "state.pth")
    command = ["--dataset", "small", "--device", "cpu", *EPOCHS, "--loops", "2", "--resume", base]
    assert scripts("train_cross_attention", *command, "--save_path", folder) == 2
    assert message in capsys.readouterr().err


# images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_without_palette() -> bytes:
    head = struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(20))) + chunk(b"IEND", b"")


def saved_as(path: Path, kind: str) -> None:
    content = io.BytesIO()  # SPIDER's writer takes over the suffix of a path
    Image.new("F" if kind == "SPIDER" else "RGB", (8, 8)).save(content, kind)
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(png_without_palette()),
        *(lambda path, kind=kind: saved_as(path, kind) for kind in ("EPS", "DDS", "SPIDER", "TGA", "PCX", "SGI")),
        lambda path: path.write_bytes(b"BLP2" + bytes(200)),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
    ],
)
def test_whatever_a_decoder_raises_is_one_images_failure(tmp_path, write):
    path = tmp_path / "x.png"
    write(path)
    for read in (read_image, read_defect):
        with pytest.raises(ValueError, match=r"x\.png: not readable as"):
            read(path)


@pytest.mark.parametrize("size", [(20_000, 8_000), (13_000, 13_000), (1, 130_000_000)])
def test_a_small_file_of_a_huge_image_is_refused(tmp_path, size):
    head = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b""))
    for read in (read_image, size_on_disk, read_defect):
        with pytest.raises(ValueError, match="expected at most 128,000,000 pixels"):
            read(tmp_path / "x.png")


def test_large_images_are_decoded_one_after_the_other(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr("dataset.images.LARGE", 63)
    monkeypatch.setattr("dataset.images.as_rgb", lambda image, bits: one_large.locked())
    assert read_image(tmp_path / "x.png") is True and not one_large.locked()


def test_a_decoder_that_fails_in_its_own_way_is_a_value_error(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for error in (AssertionError(), IndexError("far"), MemoryError(), RecursionError("deep"), struct.error("short")):

        def broken(self, error=error):
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
        with pytest.raises(ValueError, match=r"x\.png: not readable as an image \(.+\)"):
            read_image(tmp_path / "x.png")
        assert size_on_disk(tmp_path / "x.png") == (8, 8)


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "LA", "L", "CMYK"])
def test_large_images_are_converted_band_by_band_to_the_same_pixels(tmp_path, monkeypatch, mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (37, 23), dtype=np.uint16))
    elif mode != "RGBA":
        picture = picture.convert("RGB").convert(mode) if mode == "P" else picture.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.save(path)
    whole = np.asarray(read_image(path))
    monkeypatch.setattr("dataset.images.BAND", 23 * 5)
    assert np.array_equal(np.asarray(read_image(path)), whole) and whole.shape == (37, 23, 3)


# lists and tables


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 1: not JSON"),
        ('{"image_path": "a", "label": ' + "1" * 5000 + ', "class_name": "b"}', "line 1: not JSON"),
        ('{"image_path": "a", "label": [[[]]], "class_name": "b"}', "label is 'list'"),
        ('{"image_path": "' + "a" * 5000 + '", "label": 0, "class_name": "b"}', "has 5000 characters"),
        ('{"image_path": "a", "label": 0, "class_name": "b\\u001b[2J"}', "without control characters"),
        ('{"image_path": "a", "label": 0, "class_name": " "}', "expected a name"),
        ('{"image_path": "../a", "label": 0, "class_name": "b"}', "outside the data set's folder"),
        ('{"image_path": "a\\u0000b", "label": 0, "class_name": "b"}', "which no file can be called"),
        ('{"image_path": "a\\ud800b", "label": 0, "class_name": "b"}', "which no file can be called"),
        ('{"image_path": "a", "label": 1, "class_name": "b", "mask_path": "a\\u0000"}', "which no file can be called"),
    ],
)
def test_lists_that_are_none_are_refused_at_once(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(line, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        read_records(tmp_path / "x.jsonl")
    assert time.monotonic() - started < 2 and len(str(error.value)) < 500


@pytest.mark.parametrize("mask", ["NaN", '"../x"', '"/etc/passwd"', '"a\\u0000"', "[]", "3"])
def test_a_mask_of_a_normal_image_is_not_read_whatever_it_is(tmp_path, mask):
    line = f'{{"image_path": "a", "label": 0, "class_name": "b\u00a0c", "mask_path": {mask}}}'
    (tmp_path / "x.jsonl").write_text(line, encoding="utf-8")
    assert read_records(tmp_path / "x.jsonl") == [Record("a", 0, "b\u00a0c")]
    (tmp_path / "x.jsonl").write_text(line.replace('"label": 0', '"label": 1'), encoding="utf-8")
    if mask == "NaN":
        assert read_records(tmp_path / "x.jsonl") == [Record("a", 1, "b\u00a0c")]
    elif mask != "[]":
        with pytest.raises(ValueError, match="mask_path"):
            read_records(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("candle,test,anomaly,/etc/passwd,a.png", "row 2: image_path '/etc/passwd' lies outside"),
        ("candle,test,anomaly,a.png,../../b.png", "row 2: mask_path '../../b.png' lies outside"),
        ("candle,test,anomaly,C:\\\\x.png,a.png", "lies outside"),
        ("candle,test,normal", "row 2: image_path is None, expected a text"),
    ],
)
def test_visas_table_stays_in_its_folder(tmp_path, row, message):
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "candle").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text(f"object,split,label,image,mask\n{row}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("\\", ".")):
        list(visa(tmp_path, ["candle"]))


def test_links_out_of_the_folder_are_read_where_that_is_asked_for(scripts, tmp_path, capsys):
    outside = write_small_dataset(tmp_path / "outside")
    root = tmp_path / "root" / "small"
    root.mkdir(parents=True)
    (root / "full-shot.jsonl").write_bytes((outside / "full-shot.jsonl").read_bytes())
    (root / "metal_nut").symlink_to(outside / "metal_nut")
    (root / "candle").symlink_to(outside / "candle")
    with pytest.raises(ValueError, match="--follow_links"):
        open_dataset("small", tmp_path / "root")
    assert len(open_dataset("small", tmp_path / "root", follow_links=True).records) == 20
    listed = ["test", "--dataset", "small", "--list_images"]
    assert scripts(*listed, data_root=tmp_path / "root") == 2
    assert scripts(*listed, "--follow_links", data_root=tmp_path / "root") == 0
    # A folder that is a link itself is the user's own word.
    (tmp_path / "root" / "linked").symlink_to(outside)
    assert len(open_dataset("linked", tmp_path / "root").records) == 20
    check_paths(read_records(outside / "full-shot.jsonl"), tmp_path / "root" / "linked")
