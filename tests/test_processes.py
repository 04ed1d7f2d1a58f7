"""Several processes do what one does: torchrun's, two of them, without a GPU."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.weights import REPOSITORY
from tests.conftest import Scripts, tensors, write_small_dataset
from utils import checkpoints, processes
from utils.machine import device_of
from utils.training.steps import _own_pieces

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# 20 images, 4 of them held out, some without a mask: four batches of five, whose last has one image for two processes.
TRAINING = ["--dataset", "small", "--device", "cpu", "--text_epoch", "1", "--image_epoch", "1", "--loops", "1"]
TRAINING += ["--text_batch_size", "5", "--image_batch_size", "5", "--val_fraction", "0.2", "--lr_schedule", "cosine"]
TRAINING += ["--eval_dataset", "small"]
# Runs a script, with something done in a process at the start of a step of training.
AT_STEP = """
import os, runpy, signal, sys
from utils.training.trainer import Trainer

original, calls = Trainer.train_step, []

def train_step(self, *arguments):
    calls.append(1)
    if len(calls) == {step} and os.environ.get("RANK") == "{rank}":
        {what}
    return original(self, *arguments)

Trainer.train_step = train_step
sys.argv = sys.argv[1:]
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


def call(command: list[object], **told: object) -> subprocess.CompletedProcess:
    """Run a command as its user would; its output as text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    env |= {name: str(value) for name, value in told.items()}
    named = [str(word) for word in command]
    return subprocess.run(named, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)


def training(number: int, root: Path, folder: Path, *more: object) -> subprocess.CompletedProcess:
    """A training by so many processes."""
    script = ["train_cross_attention.py", "--resume", "ckpt/demo/base", *TRAINING]
    return call([*TORCHRUN, number, *script, "--data_root", root, "--save_path", folder, *more])


def train_alone(root: Path, folder: Path) -> int:
    """The same by this process; its exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        command = ["train_cross_attention", "--resume", REPOSITORY / "ckpt" / "demo" / "base", *TRAINING]
        return Scripts(monkeypatch, root)(*command, "--save_path", folder)


def broken_training(root: Path, folder: Path, program: Path, step: int, rank: int, what: str):
    """A training by two processes, in one of which something is done at the start of a step."""
    program.write_text(AT_STEP.format(step=step, rank=rank, what=what))
    script = ["train_cross_attention.py", "--resume", "ckpt/demo/base", *TRAINING]
    return call([*TORCHRUN, 2, program, *script, "--data_root", root, "--save_path", folder])


def furthest(first: Path, second: Path) -> float:
    """The largest difference between two loop files."""
    a, b = tensors(first / "loop_1.pth"), tensors(second / "loop_1.pth")
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def own_lines(text: str) -> list[str]:
    """What a program said of its end; torchrun adds a report of its own."""
    return [line for line in text.splitlines() if line.startswith(("error:", "Stopped by"))]


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
    done = training(2, partly_masked, folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Saved") == 2  # loop_0.pth and loop_1.pth: one process speaks
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
    what = "os.kill(os.getpid(), signal.SIGTERM)"
    done = broken_training(partly_masked, tmp_path / "x", tmp_path / "program.py", 6, rank=1, what=what)
    assert done.returncode == 1
    (line,) = own_lines(done.stderr)
    assert line.startswith("Stopped by") and "at loop 1, Stage 2, epoch 1, step 2; the state is saved" in line
    done = training(3, partly_masked, tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert "Going on at loop 1, Stage 2, epoch 1, step 2." in done.stderr
    assert furthest(alone, tmp_path / "x") < 1e-5
    assert len(rows(alone)) == len(rows(tmp_path / "x"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "Another process of this job is gone"),
        ("raise ValueError('part.png: not readable as an image.')", "error: part.png: not readable as an image."),
    ],
)
def test_a_process_that_fails_ends_all_with_one_message(partly_masked, alone, tmp_path, what, message):
    done = broken_training(partly_masked, tmp_path / "x", tmp_path / "program.py", 3, rank=1, what=what)
    assert done.returncode == 1
    (line,) = own_lines(done.stderr)
    assert message in line and "The last state is whole" in line
    assert message.removeprefix("error: ") in (tmp_path / "x" / "train.log").read_text()
    # The first process was between two steps, and saves where it was.
    assert checkpoints.read(tmp_path / "x" / "state.pth")["position"] == (1, "text", 0, 2)
    assert train_alone(partly_masked, tmp_path / "x") == 0
    assert furthest(alone, tmp_path / "x") < 1e-5
    assert len(rows(alone)) == len(rows(tmp_path / "x"))


def test_what_processes_cannot_share_is_refused(partly_masked, tmp_path):
    done = training(2, partly_masked, tmp_path / "x", "--image_batch_size", "1")
    assert done.returncode == 1 and not (tmp_path / "x").exists()
    (line,) = own_lines(done.stderr)
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
    """Two machines, each with a data set of its own: their processes are started one by one."""
    write_small_dataset(tmp_path / "other" / "small", per_kind=6)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    script = [sys.executable, "train_cross_attention.py", "--resume", "ckpt/demo/base", *TRAINING]
    started = []
    for rank, root in enumerate((partly_masked, tmp_path / "other")):
        told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        told |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        command = [*script, "--data_root", str(root), "--save_path", str(tmp_path / "x")]
        env = {**os.environ, **{name: str(value) for name, value in told.items()}}
        started.append(subprocess.Popen(command, cwd=REPOSITORY, env=env, stderr=subprocess.PIPE, text=True))
    lines = [own_lines(process.communicate(timeout=120)[1]) for process in started]
    (line,) = lines[0] + lines[1]
    assert "The processes of this job differ in images to train on" in line and "the same files" in line
    assert not (tmp_path / "x").exists()


def test_a_port_in_use_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = call([sys.executable, "test.py", "--ckpt", "ckpt/demo/base"], **told)
    assert done.returncode == 2
    (line,) = own_lines(done.stderr)
    assert f"2 processes were to meet at 127.0.0.1:{port}" in line and "the port is in use" in line


def test_two_processes_test_what_one_does(partly_masked, alone, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", alone / "loop_1.pth", "--dataset", "small", "--device", "cpu"]
    flags += ["--batch_size", "3", "--resamples", "20"]  # the last round has one batch
    assert Scripts(monkeypatch, partly_masked)("test", *flags, "--save_path", tmp_path / "0") == 0
    script = ["test.py", *flags, "--data_root", partly_masked, "--save_path", tmp_path / "1"]
    done = call([*TORCHRUN, 2, *script])
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.*"))
    assert len(files) == 6
    for path in files:
        assert (tmp_path / "0" / path).read_bytes() == (tmp_path / "1" / path).read_bytes(), path


def test_two_processes_predict_what_one_does(partly_masked, alone, tmp_path, monkeypatch, capsys):
    folder = partly_masked / "small" / "candle"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    shutil.copy(broken, tmp_path / "also broken.png")
    images = [broken, tmp_path / "also broken.png", *sorted(folder.glob("1_?.png"))]
    flags = ["--ckpt", alone, "--device", "cpu", "--images", *images, "--save_path"]
    assert Scripts(monkeypatch, partly_masked)("predict", *flags, tmp_path / "0") == 1
    done = call([*TORCHRUN, 2, "predict.py", *flags, tmp_path / "1"])
    assert done.returncode == 1
    assert f"2 of 7 images could not be judged: {broken}, {tmp_path / 'also broken.png'}" in done.stderr
    assert done.stdout == capsys.readouterr().out
    names = [sorted(path.name for path in (tmp_path / number).iterdir()) for number in ("0", "1")]
    assert names[0] == names[1] and len(names[0]) == 1 + 5 * 3  # the table, and of each image a picture and two maps
    for name in names[0]:
        first, second = (tmp_path / number / name for number in ("0", "1"))
        if name.endswith(".npy"):
            assert np.array_equal(np.load(first), np.load(second))
        else:
            assert first.read_bytes() == second.read_bytes()


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
