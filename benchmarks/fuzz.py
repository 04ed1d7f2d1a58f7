"""Feed damaged and hostile input to all that reads a file or an argument, and see that it is refused in words.

    python -m benchmarks.fuzz --inputs 100000

Lists and tables of images, logs, images, checkpoints and states (as dictionaries and as bytes), CLIP weights, @FILEs
and command lines: valid ones with some changes, by hypothesis. An input is taken, or refused by one of the documented
exceptions (ValueError and OSError; of arguments, exit code 2). Whatever else comes is printed with its input, and so is
an input that takes over 2 s, twice; then, and where memory grows by more than 1 GB, the exit code is 1.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from PIL import Image

import predict
import test
import train
import train_cross_attention
from benchmarks.faults import WORDS as TRAINING
from benchmarks.faults import finish, forked, small_data
from benchmarks.standin import Scripted
from dataset.images import read_defect, read_image, size_on_disk
from dataset.layouts import visa
from dataset.records import check_paths, digest, read_records
from model.backbone import load_backbone
from utils import arguments
from utils.checkpoints import load_checkpoint
from utils.cli import run_script
from utils.logs import progress
from utils.models import ModelLoader
from utils.options import at_least
from utils.training.folder import open_run
from utils.training.log import COLUMNS, CsvLog

# Of the processor, so that other programs on the machine make no difference; and of the clock, for what waits.
SECONDS, WAIT, MEGABYTES = 2.0, 20.0, 1024
# Most that are printed of one kind.
SHOWN = 5
LINE = {"image_path": "a/b.png", "label": 1, "class_name": "bolt", "mask_path": "a/b_mask.png"}
TABLE = b"object,split,label,image,mask\nbolt,test,anomaly,a/b.png,a/b_mask.png\nbolt,test,normal,a/b.png,\n"
# Formats that are read, and some that are not, whatever a file is called.
FORMATS = {
    "RGB": ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "TGA", "DDS", "EPS", "SGI", "PCX", "SPIDER"),
    "RGBA": ("PNG", "TIFF", "WEBP"),
    "P": ("PNG", "GIF", "TIFF", "BMP"),
    "L": ("PNG", "JPEG", "PPM"),
    "I;16": ("PNG", "TIFF", "PPM"),
    "1": ("PNG", "TIFF"),
    "CMYK": ("JPEG", "TIFF"),
    "F": ("TIFF", "SPIDER"),
}
TEXTS = (
    *("", " ", "-1", "0", "3", "0.5", "1e300", "9" * 30, "1" * 5000, "nan", "inf", "../x", "/etc/passwd", "~"),
    *("\x1b[2J", "\udc80", "=1+1", "a" * 300, "$x^$", "%s", "{}", "a/b", "average", "con"),
)
WORDS = (*TEXTS, "@x", "cpu", "meta", "cuda:99", "RN50", "hf-hub:a/b", "demo", "block", "full", "VisA", ".", "small")
SCRIPTS = {script.__name__: script for script in (train, train_cross_attention, test, predict)}


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--inputs", type=at_least(100), default=10_000, help="of all kinds together")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the inputs")
    return parser.parse_args()


# inputs

odd_texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=20))
odd_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), odd_texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)),
    max_leaves=5,
)
words = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=10)), max_size=2)
arguments_in_a_file = st.lists(
    st.lists(
        st.one_of(st.sampled_from((*WORDS, '"', "'", "#", "--loops", "@input")), st.text(max_size=30)), max_size=4
    ),
    max_size=5,
)
# What is done to bytes: (kind, place in the middle 4 of 10^6, new bytes).
edits = st.lists(
    st.tuples(
        st.sampled_from(("replace", "insert", "repeat", "cut", "number")),
        st.integers(0, 10**6),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)
# What is done to a dictionary: (kind, which of its places, which of `odd_values`).
changes = st.lists(
    st.tuples(st.sampled_from(("replace", "add", "delete")), st.integers(0, 10**6), st.integers(0, 10**6)),
    min_size=1,
    max_size=3,
)


@st.composite
def lists(draw: Callable) -> bytes:
    """A list of images, some of whose fields are anything."""
    lines = []
    for _ in range(draw(st.integers(0, 4))):
        entry: dict[str, Any] = dict(LINE)
        for name in draw(st.lists(st.sampled_from((*LINE, "other")), max_size=2)):
            entry[name] = draw(odd_json)
        lines.append(json.dumps(entry))
    lines.append("[" * draw(st.sampled_from((0, 0, 0, 2000, 100_000))))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def edited(valid: bytes, chosen: list[tuple[str, int, bytes]]) -> bytes:
    """Valid bytes, some of them replaced, put in, repeated or cut off."""
    data = bytearray(valid)
    for what, share, new in chosen:
        place = share * len(data) // 10**6
        if what == "cut":
            del data[place : place + new[0] * (1 + len(data) // 256)]
        elif what == "repeat":
            data[place:place] = data[place : place + 64] * new[0]
        elif what == "number":
            data[place : place + 4] = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)[new[0] % 5].to_bytes(4, "little")
        else:
            data[place : place + (len(new) if what == "replace" else 0)] = new
    return bytes(data)


def odd_values() -> list[Any]:
    """What might stand anywhere in a file of `torch.save`."""
    plain: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        3,
        8000,
        10**9,
        2**64,
        math.nan,
        math.inf,
        -0.5,
        [],
        {},
        (),
        [[]],
        {"a": 1},
    ]
    tensors = [
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(2, 0),
        torch.zeros(10**6, 0),
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(3, 3, dtype=torch.int64),
        torch.zeros(3, 3, dtype=torch.complex64),
        torch.zeros(96, 128, dtype=torch.bool),
        torch.full((96, 128), math.nan),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(10**6, 10**6, device="meta"),
        torch.zeros(5056, dtype=torch.uint8),
    ]
    return [*plain, *TEXTS, *tensors, {"a": 1}, {1: torch.zeros(1)}, {"step": torch.zeros(())}, np.float64(1.0), b"x"]


def altered(content: dict, chosen: list[tuple[str, int, int]], values: list[Any]) -> dict:
    """A dictionary with other values in it, more of them or fewer; tensors that stay are shared."""
    content = _copied(content)
    for what, place, value in chosen:
        inside = list(_dictionaries(content))
        container = inside[place % len(inside)]
        if not container:
            continue
        key = list(container)[place // len(inside) % len(container)]
        if what == "delete":
            del container[key]
        else:
            container[key if what == "replace" else f"{key}x"] = _copied(values[value % len(values)])
    return content


def _copied(content: Any) -> Any:
    return {key: _copied(value) for key, value in content.items()} if isinstance(content, dict) else content


def _dictionaries(content: dict) -> Iterator[dict]:
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from _dictionaries(value)


# what reads them


class Readers:
    """All that reads a file or an argument, each over valid files that a small training made in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.file, self.values = folder, folder / "input", odd_values()
        (folder / "data" / "small").mkdir(parents=True)
        (folder / "visa" / "split_csv").mkdir(parents=True)
        (folder / "visa" / "bolt").mkdir()
        for place in (folder / "lists" / "a", folder / "visa" / "a"):
            place.mkdir(parents=True)
            for name in ("b.png", "b_mask.png"):
                Image.new("L", (8, 8), 255).save(place / name)
        (folder / "again").mkdir()
        (folder / "base2").mkdir()
        small_data(folder / "data")
        common = ["--dataset", "small", "--data_root", str(folder / "data"), *TRAINING]
        base, self.words = folder / "base", [*common, "--resume", str(folder / "base"), "--loops", "1"]
        first = [*common, "--model_name", "demo", "--save_path", str(base)]
        then = [*self.words, "--save_path", str(folder / "run")]
        for script, more in ((train, first), (train_cross_attention, then)):
            if code := finish(forked(script, more)):
                raise RuntimeError(f"{script.__name__} ended with {code}.")
        self.loader = ModelLoader(torch.device("cpu"), backbone=load_backbone("demo"))
        self.contents = {
            path: torch.load(path, weights_only=True)
            for path in (folder / "run/loop_1.pth", folder / "run/state.pth", *sorted(base.glob("*_adapter.pth")))
        }
        again = train_cross_attention.parse_arguments([*self.words, "--save_path", str(folder / "again")])
        self.plan = train_cross_attention.make_plan(again, load_checkpoint(base))
        self.weights = {name: value.half() for name, value in self.loader.backbone.clip.state_dict().items()}
        torch.jit.script(Scripted({"a.b": torch.zeros(3, 2), "c": torch.zeros(1)})).save(self.file)
        self.archives = [self.file.read_bytes(), (folder / "run/loop_1.pth").read_bytes()]
        self.images = list(_images())
        self.flags = {name: _flags(script) for name, script in SCRIPTS.items()}

    def kinds(self) -> dict[str, tuple[int, st.SearchStrategy, Callable[[Any], None]]]:
        """{kind of input: (its share of all, what it is, what reads it)}."""
        images = st.tuples(st.sampled_from(range(len(self.images))), edits)
        archives = st.tuples(st.sampled_from(range(len(self.archives))), edits)
        script = st.sampled_from(sorted(SCRIPTS))
        lines = script.flatmap(
            lambda name: st.tuples(
                st.just(name), st.lists(st.tuples(st.sampled_from(self.flags[name]), words), max_size=4)
            )
        )
        return {
            "lists of images": (20, lists(), self.read_list),
            "lists, changed bytes": (10, edits, self.read_changed_list),
            "VisA's table": (10, edits, self.read_table),
            "logs": (5, edits, self.read_log),
            "images": (20, images, self.read_picture),
            "loop files": (6, changes, self.read_loop_file),
            "bases": (5, changes, self.read_base),
            "states of runs": (5, changes, self.read_state),
            "CLIP weights": (2, changes, self.read_clip),
            "archives, changed bytes": (7, archives, self.read_archive),
            "@FILEs": (6, arguments_in_a_file, self.read_arguments),
            "command lines": (4, lines, self.run_command),
        }

    def read_list(self, data: bytes) -> None:
        """As --dataset LIST does."""
        path = self.folder / "lists" / "full-shot.jsonl"
        path.write_bytes(data)
        records = read_records(path)
        digest(records)
        check_paths(records, path.parent)

    def read_changed_list(self, chosen: list) -> None:
        """The same of a valid list with other bytes in it."""
        self.read_list(edited("\n".join([json.dumps(LINE)] * 3).encode(), chosen))

    def read_table(self, chosen: list) -> None:
        """As VisA is read."""
        (self.folder / "visa" / "split_csv" / "1cls.csv").write_bytes(edited(TABLE, chosen))
        check_paths(list(visa(self.folder / "visa", ["bolt"])), self.folder / "visa")

    def read_log(self, chosen: list) -> None:
        """As a run goes on with its log."""
        path = self.folder / "log.csv"
        path.write_bytes(edited((self.folder / "run" / "log.csv").read_bytes(), chosen))
        CsvLog(path, COLUMNS).open(keep=lambda row: True)
        for aside in self.folder.glob("log_damaged_*"):
            aside.unlink()

    def read_picture(self, chosen: tuple[int, list]) -> None:
        """As images and masks are read."""
        number, changes = chosen
        self.file.write_bytes(edited(self.images[number], changes))
        for read in (read_image, read_defect, size_on_disk):
            with contextlib.suppress(ValueError):
                read(self.file)
        read_image(self.file)

    def read_loop_file(self, chosen: list) -> None:
        """As --ckpt RUN/loop_1.pth does."""
        path = self.folder / "run" / "loop_1.pth"
        torch.save(altered(self.contents[path], chosen, self.values), self.file)
        self.loader(load_checkpoint(self.file))

    def read_base(self, chosen: list) -> None:
        """As --resume BASE does."""
        for path, content in self.contents.items():
            if path.parent.name == "base":
                torch.save(altered(content, chosen, self.values), self.folder / "base2" / path.name)
        self.loader(load_checkpoint(self.folder / "base2"))

    def read_state(self, chosen: list) -> None:
        """As a run goes on."""
        content = self.contents[self.folder / "run" / "state.pth"]
        torch.save(altered(content, chosen, self.values), self.folder / "again" / "state.pth")
        open_run(self.plan)

    def read_clip(self, chosen: list) -> None:
        """As --clip_weights does."""
        torch.save(altered(self.weights, chosen, self.values), self.file)
        load_backbone("demo", clip_weights=self.file)

    def read_archive(self, chosen: tuple[int, list]) -> None:
        """The bytes of TorchScript and of a loop file, as weights and as a checkpoint."""
        number, changes = chosen
        self.file.write_bytes(edited(self.archives[number], changes))
        with contextlib.suppress(ValueError):
            load_checkpoint(self.file)
        load_backbone("demo", clip_weights=self.file)

    def read_arguments(self, lines: list[list[str]]) -> None:
        """As @FILE is read, which may name itself."""
        text = "\n".join(" ".join(line) for line in lines)
        self.file.write_text(text, encoding="utf-8", errors="surrogateescape")
        _refused(lambda: train_cross_attention.parse_arguments([f"@{self.file}"]))

    def run_command(self, chosen: tuple[str, list[tuple[str, list[str]]]]) -> None:
        """A script with some of its flags, and anything behind them; of trainings the plan alone.

        Without what to expect of it, which takes seconds whatever the flags.
        """
        name, flags = chosen
        data, nowhere = str(self.folder / "data"), str(self.folder / "nowhere")
        first = {
            "test": ["--data_root", data, "--dataset", "small", "--ckpt", nowhere],
            "predict": ["--images", data, "--ckpt", nowhere],
        }
        given = [word for flag, values in flags for word in (flag, *values)]
        sys.argv = [f"{name}.py", *first.get(name, ["--dry_run"]), *given]
        with mock.patch.object(SCRIPTS[name], "describe_estimates", return_value="", create=True):
            _refused(SCRIPTS[name].main)


def _refused(call: Callable[[], Any]) -> None:
    """Call something that may end the process, as arguments that are wrong do. Raises ValueError where it did."""
    try:
        call()
    except SystemExit as end:
        if end.code not in (0, 2):
            raise
        raise ValueError("refused") from end


def _images() -> Iterator[bytes]:
    """A small image in every mode and format."""
    ramp = np.arange(24 * 18 * 3, dtype=np.uint32).reshape(18, 24, 3) * 7 % 256
    picture = Image.fromarray(ramp.astype(np.uint8))
    for mode, formats in FORMATS.items():
        image = Image.fromarray(ramp[..., 0].astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
        for kind in formats:
            file = io.BytesIO()
            image.save(file, kind)
            yield file.getvalue()


def _flags(script: ModuleType) -> list[str]:
    """The flags that --help of a script names."""
    said, before = io.StringIO(), sys.argv
    sys.argv = [script.__name__, "--help"]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        script.parse_arguments()
    sys.argv = before
    return sorted(
        {word.strip("[],") for word in said.getvalue().split() if word.startswith(("--", "[--"))} - {"--help"}
    )


# the campaign


class Tally(NamedTuple):
    """What became of the inputs of a kind; `failures` are tracebacks, or an input that took too long."""

    taken: int
    refused: int
    slowest: float
    failures: list[str]


def feed(strategy: st.SearchStrategy, read: Callable[[Any], None], count: int, seed: int, step: Callable) -> Tally:
    """Draw `count` inputs and have them read."""
    taken, slowest, failures = [0, 0], 0.0, []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def one(value: Any) -> None:
        nonlocal slowest
        began, started = time.perf_counter(), time.process_time()
        try:
            read(value)
            taken[0] += 1
        except (ValueError, OSError):
            taken[1] += 1
        except Exception:
            failures.append(f"{value!r:.500}\n{traceback.format_exc()[-3000:]}")
        took, passed = time.process_time() - started, time.perf_counter() - began
        if took > SECONDS:  # the second time of an input that is slow itself is no better
            started = time.process_time()
            with contextlib.suppress(Exception):
                read(value)
            took = min(took, time.process_time() - started)
        slowest = max(slowest, took)
        if took > SECONDS or passed > WAIT:
            failures.append(f"{value!r:.500}\ntook {took:.1f} s of the processor, {passed:.1f} s in all")
        step()

    one()
    return Tally(taken[0], taken[1], slowest, failures)


def peak_megabytes() -> float:
    """The most memory that this process had, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        readers = Readers(Path(temporary))
        kinds = readers.kinds()
        logging.disable(logging.CRITICAL)
        before, shares = peak_megabytes(), sum(share for share, _, _ in kinds.values())
        print(f"{'':26}{'inputs':>9}{'taken':>9}{'refused':>9}{'slowest':>10}{'failures':>10}")
        with progress(total=args.inputs, desc="inputs", unit="input") as bar:
            for number, (name, (share, strategy, read)) in enumerate(kinds.items()):
                count = args.inputs * share // shares
                quiet = io.StringIO()
                with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                    found = feed(strategy, read, count, args.seed + number, bar.update)
                numbers = f"{found.taken + found.refused:9}{found.taken:9}{found.refused:9}{found.slowest:8.2f} s"
                bar.write(f"{name:26}{numbers}{len(found.failures):10}", file=sys.stdout)
                for failure in found.failures[:SHOWN]:
                    bar.write(failure, file=sys.stdout)
                failed += len(found.failures)
        grown = peak_megabytes() - before
    print(f"{failed} failures; memory grew by {grown:.0f} MB.")
    return 1 if failed or grown > MEGABYTES else 0


if __name__ == "__main__":
    run_script(main)
