"""Several processes do what one does: two of them, by torchrun or started one by one, without a GPU."""

import csv
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import REPOSITORY
from tests.conftest import Scripts, tensors, write_small_dataset
from utils import checkpoints, processes
from utils.cli import run_script
from utils.machine import device_of
from utils.signals import SIGNALS, StopSignal, end_by_words
from utils.training.steps import _own_pieces

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forked processes, and their signals")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# 20 images, 4 of them held out, some without a mask: four batches of five, whose last has one image for two processes.
TRAINING = ["--resume", REPOSITORY / "ckpt" / "demo" / "base", "--dataset", "small", "--device", "cpu", "--loops", "1"]
TRAINING += ["--text_epoch", "1", "--image_epoch", "1"]
TRAINING += ["--text_batch_size", "5", "--image_batch_size", "5", "--val_fraction", "0.2", "--lr_schedule", "cosine"]
TRAINING += ["--eval_dataset", "small"]
TRAIN_STEP = "utils.training.trainer:Trainer", "train_step"
# Runs a script, which something befalls.
BEFALLEN = """
import runpy, sys
from tests import test_processes

test_processes.befall(test_processes.{what}, {step})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def partly_masked(tmp_path_factory) -> Path:
    """A data root whose data set lacks some masks."""
    root = tmp_path_factory.mktemp("data")
    listed = write_small_dataset(root / "small") / "full-shot.jsonl"
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    for entry in [entry for entry in entries if entry["label"]][:3]:
        del entry["mask_path"]
    listed.write_text("\n".join(map(json.dumps, entries)))
    return root


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As torchrun has it: the number of threads may change last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failed() -> None:
    raise ValueError("part.png: not readable as an image.")


def nothing() -> None: ...


def befall(what: Callable[[], None], step: int, place: tuple[str, str] = TRAIN_STEP) -> None:
    """Have something happen in the second process at the start of a step of its work, counted from 1.

    `place`: what has the function that does a step, and its name.
    """
    owner, name = pkgutil.resolve_name(place[0]), place[1]
    original, calls = getattr(owner, name), []

    def begin(*arguments, **named):
        calls.append(1)
        if len(calls) == step and processes.number() == 1:
            what()
        return original(*arguments, **named)

    setattr(owner, name, begin)


class Job:
    """Processes of one job that have ended: their exit codes, and what all of them wrote."""

    def __init__(self, codes: list[int], out: str, err: str):
        self.codes, self.out, self.err = codes, out, err

    @property
    def own_lines(self) -> list[str]:
        """What the program said of its end; torchrun adds a report of its own."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "Stopped by"))]


def torchrun(number: int, *command: object) -> Job:
    """A command by so many processes, as its user starts them; the exit code is torchrun's."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words = [*TORCHRUN, str(number), *map(str, command)]
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    return Job([done.returncode], done.stdout, done.stderr)


def _process(script: str, words: list[str], told: dict[str, str], log: Path, fate: tuple[Any, ...]) -> None:
    """What a process of a job does, and what befalls it."""
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(log.with_suffix(f".{end}"), os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    os.environ |= told
    os.chdir(REPOSITORY)
    befall(*fate)
    sys.argv = [f"{script}.py", *words]
    run_script(importlib.import_module(script).main)


def by_hand(
    script: str,
    commands: list[list[object]],
    logs: Path,
    fate: tuple[Any, ...] = (nothing, 1),
    port: int = 0,
    missing: int = 0,
) -> Job:
    """A script by processes that were started one by one, each with a command of its own; `fate` as in `befall`.

    They are forked from a process that has imported everything, which saves seconds of each. `missing` ones of the job
    are not started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "train_cross_attention", "test", "predict"])
    if not port:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    logs.mkdir()
    told = {"WORLD_SIZE": len(commands) + missing, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank, words in enumerate(commands):
        own = {name: str(value) for name, value in (told | {"RANK": rank}).items()}
        arguments = script, list(map(str, words)), own, logs / str(rank), fate
        started.append(context.Process(target=_process, args=arguments))
        started[-1].start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    out, err = ("".join(path.read_text() for path in sorted(logs.glob(f"*.{end}"))) for end in ("out", "err"))
    return Job([process.exitcode for process in started], out, err)


def training(root: Path, folder: Path) -> list[object]:
    """The words of a training."""
    return [*TRAINING, "--data_root", root, "--save_path", folder]


def train_alone(root: Path, folder: Path) -> int:
    """A training by this process; its exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Scripts(monkeypatch, root)("train_cross_attention", *TRAINING, "--save_path", folder)


def furthest(first: Path, second: Path) -> float:
    """The largest difference between two loop files."""
    a, b = tensors(first / "loop_1.pth"), tensors(second / "loop_1.pth")
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(partly_masked, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert train_alone(partly_masked, folder) == 0
    return folder


@pytest.fixture(scope="module")
def together(partly_masked, tmp_path_factory) -> Path:
    """The same run of two processes."""
    folder = tmp_path_factory.mktemp("runs") / "together"
    done = torchrun(2, "train_cross_attention.py", *training(partly_masked, folder))
    assert done.codes == [0], done.err
    assert "2 processes share each batch." in (folder / "train.log").read_text()
    assert done.err.count("Saved") == 2  # loop_0.pth and loop_1.pth: one process speaks
    return folder


def test_two_processes_train_what_one_does(alone, together):
    assert furthest(alone, together) < 1e-5
    for one, other in zip(rows(alone), rows(together), strict=True):
        for name, value in one.items():
            if re.fullmatch(r"[-+.\de]+", value):
                assert float(other[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
            else:
                assert other[name] == value
    files = [{path.name for path in folder.iterdir()} for folder in (alone, together)]
    assert files[0] == files[1]
    one, other = (checkpoints.read(folder / "loop_1.pth")["calibration"] for folder in (alone, together))
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=1e-3), name


def test_a_signal_to_one_process_ends_all_and_another_number_goes_on(partly_masked, alone, tmp_path):
    program, words = tmp_path / "program.py", training(partly_masked, tmp_path / "x")
    program.write_text(BEFALLEN.format(what="terminated", step=6))
    done = torchrun(2, program, "train_cross_attention.py", *words)
    assert done.codes == [1]
    (line,) = done.own_lines
    assert line.startswith("Stopped by") and "at loop 1, Stage 2, epoch 1, step 2; the state is saved" in line
    done = by_hand("train_cross_attention", [words] * 3, tmp_path / "logs")
    assert done.codes == [0, 0, 0], done.err
    assert "Going on at loop 1, Stage 2, epoch 1, step 2." in done.err
    assert furthest(alone, tmp_path / "x") < 1e-5
    assert len(rows(alone)) == len(rows(tmp_path / "x"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (killed, "Another process of this job is gone"),
        (failed, "error: part.png: not readable as an image."),
    ],
)
def test_a_process_that_fails_ends_all_with_one_message(partly_masked, alone, tmp_path, what, message):
    words = training(partly_masked, tmp_path / "x")
    if what is killed:  # by torchrun, which ends the others too
        program = tmp_path / "program.py"
        program.write_text(BEFALLEN.format(what="killed", step=3))
        done = torchrun(2, program, "train_cross_attention.py", *words)
        assert done.codes == [1]
    else:
        done = by_hand("train_cross_attention", [words] * 2, tmp_path / "logs", (what, 3))
        assert done.codes == [1, 1]
    assert len(done.own_lines) == 1, done.err
    (line,) = done.own_lines
    assert message in line and "The last state is whole" in line and "pair.cc" not in line
    assert message.removeprefix("error: ") in (tmp_path / "x" / "train.log").read_text()
    # The first process was between two steps, and saves where it was.
    assert checkpoints.read(tmp_path / "x" / "state.pth")["position"] == (1, "text", 0, 2)
    assert train_alone(partly_masked, tmp_path / "x") == 0
    assert furthest(alone, tmp_path / "x") < 1e-5
    assert len(rows(alone)) == len(rows(tmp_path / "x"))


def test_what_processes_cannot_share_is_refused(partly_masked, tmp_path):
    words = [*training(partly_masked, tmp_path / "x"), "--image_batch_size", "1"]
    done = by_hand("train_cross_attention", [words] * 2, tmp_path / "logs")
    assert done.codes == [2, 2] and not (tmp_path / "x").exists()
    (line,) = done.own_lines
    assert "error: --image_batch_size 1: 2 processes share a batch, and each needs an image of it." in line


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *size, device: SimpleNamespace(item=lambda: 0))
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert device_of("cuda") == torch.device("cuda") and not current  # alone, whichever PyTorch takes
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="--device cuda:0: several processes cannot share it"):
        device_of("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs"):
        device_of("cuda")


def test_processes_with_other_images_are_told_so(partly_masked, tmp_path):
    """Two machines, each with a data set of its own."""
    write_small_dataset(tmp_path / "other" / "small", per_kind=6)
    commands = [training(root, tmp_path / "x") for root in (partly_masked, tmp_path / "other")]
    (line,) = by_hand("train_cross_attention", commands, tmp_path / "logs").own_lines
    assert "The processes of this job differ in images to train on" in line and "the same files" in line
    assert not (tmp_path / "x").exists()


def test_a_port_in_use_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = by_hand("test", [["--ckpt", "ckpt/demo/base"]], tmp_path / "logs", port=port, missing=1)
    assert done.codes == [2]
    (line,) = done.own_lines
    assert f"2 processes were to meet at 127.0.0.1:{port}" in line and "the port is in use" in line


def test_two_processes_test_what_one_does(partly_masked, alone, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", alone / "loop_1.pth", "--dataset", "small", "--device", "cpu"]
    flags += ["--batch_size", "3", "--resamples", "20"]  # the last round has one batch
    assert Scripts(monkeypatch, partly_masked)("test", *flags, "--save_path", tmp_path / "0") == 0
    words = [*flags, "--data_root", partly_masked, "--save_path", tmp_path / "1"]
    done = by_hand("test", [words] * 2, tmp_path / "logs")
    assert done.codes == [0, 0], done.err
    assert done.out == capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.*"))
    assert len(files) == 6
    for path in files:
        assert (tmp_path / "0" / path).read_bytes() == (tmp_path / "1" / path).read_bytes(), path


def test_pictures_of_a_process_that_is_gone_are_not_claimed(partly_masked, alone, tmp_path):
    images = sorted((partly_masked / "small" / "candle").glob("?_?.png"))
    words = ["--ckpt", alone, "--device", "cpu", "--images", *images, "--save_path", tmp_path / "out"]
    done = by_hand("predict", [words] * 2, tmp_path / "logs", (killed, 2, ("predict", "draw")))
    assert done.codes == [1, -signal.SIGKILL]
    (line,) = done.own_lines
    assert line.startswith("error: Another process of this job is gone") and "Wrote" not in done.err


@pytest.mark.parametrize(
    ("what", "said"), [(killed, "error: Another process of this job is gone"), (terminated, "Stopped by SIGTERM")]
)
def test_a_test_that_fails_says_so_once(partly_masked, alone, tmp_path, what, said):
    words = ["--ckpt", alone / "loop_1.pth", "--dataset", "small", "--data_root", partly_masked, "--device", "cpu"]
    words += ["--batch_size", "3", "--save_path", tmp_path / "results"]
    done = by_hand("test", [words] * 2, tmp_path / "logs", (what, 2, ("utils.judging:Detector", "predict")))
    assert done.codes == [1, -signal.SIGKILL if what is killed else 1], done.err
    (line,) = done.own_lines
    assert line.startswith(said)
    assert not list((tmp_path / "results").rglob("*.csv"))


def test_two_processes_predict_what_one_does(partly_masked, alone, tmp_path, monkeypatch, capsys):
    folder = partly_masked / "small" / "candle"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    shutil.copy(broken, tmp_path / "also broken.png")
    images = [broken, tmp_path / "also broken.png", *sorted(folder.glob("1_?.png"))]
    flags = ["--ckpt", alone, "--device", "cpu", "--images", *images, "--save_path"]
    assert Scripts(monkeypatch, partly_masked)("predict", *flags, tmp_path / "0") == 1
    done = by_hand("predict", [[*flags, tmp_path / "1"]] * 2, tmp_path / "logs")
    assert done.codes == [1, 1]
    assert f"2 of 7 images could not be judged: {broken}, {tmp_path / 'also broken.png'}" in done.err
    assert done.out == capsys.readouterr().out
    names = [sorted(path.name for path in (tmp_path / number).iterdir()) for number in ("0", "1")]
    assert names[0] == names[1] and len(names[0]) == 1 + 5 * 3  # the table, and of each image a picture and two maps
    for name in names[0]:
        first, second = (tmp_path / number / name for number in ("0", "1"))
        if name.endswith(".npy"):
            assert np.array_equal(np.load(first), np.load(second))
        else:
            assert first.read_bytes() == second.read_bytes()


def test_a_signal_does_not_cut_off_why_a_process_ends(monkeypatch):
    """torchrun sends SIGTERM a moment after another process is gone, while this one is about to say so."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        end_by_words()
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            try:
                raise ValueError("part.png")
            except ValueError:
                signal.raise_signal(signal.SIGTERM)
                said = "part.png"
            time.sleep(10)  # it comes again
        assert said == "part.png"
        stop = StopSignal()
        with pytest.raises(ValueError), stop:
            raise ValueError("part.png")
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_parts_of_batches(monkeypatch):
    """Every image goes to one process; one that is left out takes the first image."""
    taken = []
    for number in range(3):
        monkeypatch.setattr(processes, "count", lambda: 3)
        monkeypatch.setattr(processes, "number", lambda number=number: number)
        taken.append([list(_own_pieces([batch], pieces)) for batch in (list(range(8)), [7, 9]) for pieces in (1, 2)])
    assert [part[0] for part in taken] == [[[0, 1]], [[2, 3, 4]], [[5, 6, 7]]]
    assert [part[1] for part in taken] == [[[0], [1]], [[2], [3, 4]], [[5], [6, 7]]]
    assert [part[2] for part in taken] == [[[7]], [[7]], [[9]]]  # the first stands in
    assert processes.bounds(2, 0, 3) == (0, 0)


def test_alone_nothing_is_asked_of_others():
    values = torch.ones(2)
    assert processes.total(values) is values and processes.for_all(1) == [1] and processes.count() == 1
    assert list(processes.own_turns(range(3))) == [0, 1, 2]
    assert processes.lost_words(RuntimeError("gloo")) is None and processes.speaks("x")
