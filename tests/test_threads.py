"""How threads wait: chosen before PyTorch is there, from what else runs, unless the user has chosen."""

import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from model.config import REPOSITORY
from utils import arguments, threads

SCRIPTS = ("train", "train_cross_attention", "test", "predict", "app", "export", "pretrain_demo")


@pytest.mark.parametrize(
    ("busy", "decided", "expected"),
    [(1.0, {}, "PASSIVE"), (0.1, {}, None), (1.0, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")]
    + [(1.0, {name: "1"}, None) for name in threads.DECIDED if name != threads.WAIT_POLICY],
)
def test_threads_sleep_beside_other_programs(monkeypatch, busy, decided, expected):
    monkeypatch.setattr(threads, "busy_processors", lambda: busy)
    monkeypatch.delitem(sys.modules, "torch")
    for name in threads.DECIDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(threads.WAIT_POLICY, "")  # so that it is put back
    monkeypatch.delenv(threads.WAIT_POLICY)
    for name, value in decided.items():
        monkeypatch.setenv(name, value)
    threads.let_threads_sleep()
    assert os.environ.get(threads.WAIT_POLICY) == expected


def test_nothing_is_chosen_where_pytorch_is_there_already(monkeypatch):
    monkeypatch.setattr(threads, "busy_processors", lambda: pytest.fail("looked"))
    for name in threads.DECIDED:
        monkeypatch.delenv(name, raising=False)
    threads.let_threads_sleep()
    assert threads.WAIT_POLICY not in os.environ


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_chooses_before_it_imports_anything_else(script):
    tree = ast.parse((REPOSITORY / f"{script}.py").read_text(encoding="utf-8"))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert [name.name for name in first.names] == ["utils.threads"]


def test_the_choice_needs_no_pytorch():
    program = "import sys, utils.threads\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_the_number_of_threads_is_taken(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(arguments, "take_pixels", lambda most: None)
    for number in (None, 3):
        arguments.take_machine(SimpleNamespace(max_pixels=1000, threads=number, tf32=False, device="cpu"))
    assert taken == [3]


def test_more_threads_than_processors_are_said(monkeypatch, caplog):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(arguments, "take_pixels", lambda most: None)
    monkeypatch.setattr(arguments, "own_processors", lambda: 2)
    for number in (2, 1000):
        arguments.take_machine(SimpleNamespace(max_pixels=1000, threads=number, tf32=False, device="cpu"))
    assert [record.getMessage() for record in caplog.records] == [
        "--threads 1000: they hold each other up on 2 processors."
    ]


def test_the_look_sees_a_busy_program():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            assert max(threads.busy_processors() for _ in range(20)) > threads.BUSY
        finally:
            program.kill()
