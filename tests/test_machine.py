"""What computes: float32 on a GPU, processes that read images, a compiler that is missing."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dataset import loading
from dataset.images import MOST_PIXELS
from model.config import REPOSITORY
from tests.conftest import EPOCHS, SMALL
from utils import machine, processes
from utils.arguments import take_machine


@pytest.fixture
def float32():
    """Puts back what PyTorch does with float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(
    ("device", "asked", "taken"),
    [("cuda", True, True), ("cuda:1", True, True), ("cuda", False, False), ("cpu", True, False), ("cpu", False, False)],
)
def test_tf32_is_taken_on_cuda_where_it_is_asked_for(float32, caplog, device, asked, taken):
    take_machine(SimpleNamespace(max_pixels=MOST_PIXELS, threads=None, tf32=asked, device=device))
    assert torch.get_float32_matmul_precision() == ("high" if taken else "highest")
    assert torch.backends.cudnn.allow_tf32 == taken
    said = ["--tf32: changes nothing on cpu; expected a GPU of CUDA."]
    assert [record.getMessage() for record in caplog.records] == (said if asked and not taken else [])


@pytest.mark.parametrize(
    ("device", "own", "side_by_side", "expected"),
    [("cpu", 8, None, 0), ("cuda", 8, None, 8), ("cuda:1", 64, None, 16), ("cuda", 64, 8, 8), ("cuda", 2, 4, 1)],
)
def test_a_gpu_has_its_share_of_the_processors(monkeypatch, device, own, side_by_side, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(own)), raising=False)
    if side_by_side:
        monkeypatch.setattr(processes, "count_here", lambda: side_by_side)
    assert machine.default_workers(device) == expected


@pytest.mark.parametrize(
    ("device", "pinned"), [(None, False), (torch.device("cpu"), False), (torch.device("cuda"), True)]
)
def test_memory_is_pinned_for_cuda_alone(device, pinned):
    assert loading.make_loader([], 1, 0, device=device).pin_memory == pinned


def test_a_missing_compiler_is_said_before_the_training(data_root, tmp_path):
    run = tmp_path / "run"
    words = [*SMALL, *EPOCHS, "--data_root", data_root, "--save_path", run, "--compile"]
    without = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    without |= {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, REPOSITORY / "train.py", *map(str, words)]
    ended = subprocess.run(command, env=without, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: --compile: PyTorch cannot compile for cpu here" in ended.stderr
    assert "Traceback" not in ended.stderr and not (run / "log.csv").exists()
