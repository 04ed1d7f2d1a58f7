"""Runs that break: what was saved is whole, the same command goes on, and a message says what to do."""

import contextlib
import csv
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from dataset import files
from dataset.files import replacing, write_text
from dataset.loading import AnomalyDataset
from tests.conftest import EPOCHS, SMALL, Scripts, assert_same_tensors, listing
from utils.checkpoints import save
from utils.training import folder as folders
from utils.training.trainer import Trainer

EXTEND = ["train_cross_attention", "--dataset", "small", "--device", "cpu", *EPOCHS, "--loops", "2"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def read_log(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


@POSIX
def test_killed_anywhere_a_run_goes_on_to_the_same_tensors():
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "12", "--signals", "2"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert "6 kills at events, 6 at moments, 2 signals" in found.stdout and "14 of 14 went on" in found.stdout


def test_damaged_inputs_are_refused_in_words():
    command = [sys.executable, "-m", "benchmarks.fuzz", "--inputs", "500"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert re.search(r"^0 failures; memory grew", found.stdout, re.MULTILINE)


# full disks


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many bytes; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a disk")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
@pytest.mark.parametrize("kilobytes", [64, 1000, 4000])
def test_a_full_disk_loses_nothing(scripts, base, run, small_disk, capsys, kilobytes):
    disk = small_disk(kilobytes * 1024)
    command = [*EXTEND, "--resume", base, "--save_path", disk / "x"]
    assert scripts(*command) in (1, 2)
    said = capsys.readouterr().err
    assert "The disk is full" in said and str(disk / "x") in said and "Traceback" not in said
    assert not list((disk / "x").glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
    assert scripts(*command) == 0
    for loop in range(3):
        assert_same_tensors(disk / "x" / f"loop_{loop}.pth", run / f"loop_{loop}.pth")
    assert read_log(disk / "x") == read_log(run)


def full_after(monkeypatch, size: int) -> None:
    """Files of `replacing` hold `size` bytes at most."""

    def opened(path, mode):
        file = open(path, mode)  # noqa: SIM115, closed by Full
        write = file.write

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                write(bytes(data)[:size])
                if len(data) > size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    monkeypatch.setattr(files, "open", opened, raising=False)


def test_what_cannot_be_written_leaves_the_old_file_and_says_which(tmp_path, monkeypatch):
    path = write_text(tmp_path / "x.txt", "before")
    full_after(monkeypatch, 3)
    for write in (lambda: write_text(path, "afterwards"), lambda: save({"a": torch.zeros(9)}, path)):
        with pytest.raises(OSError, match=r"No space left on device: .*x\.txt"):
            write()
    assert path.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


def test_test_and_predict_name_the_file_of_a_full_disk(scripts, run, data_root, tmp_path, monkeypatch, capsys):
    full_after(monkeypatch, 100)
    assert scripts("test", "--ckpt", run / "loop_1.pth", "--dataset", "small", "--device", "cpu", "--resamples", 5) == 2
    assert "The disk is full: " in (said := capsys.readouterr().err) and "loop_" in said
    command = ["--ckpt", run / "loop_1.pth", "--images", data_root / "small" / "candle", "--device", "cpu"]
    assert scripts("predict", *command, "--save_path", tmp_path / "out") == 2
    assert f"The disk is full: {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    from utils.logs import _FileHandler

    handler = _FileHandler(tmp_path / "train.log", encoding="utf-8")
    handler.stream.close()
    for _ in range(3):
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "said", (), None))
    assert capsys.readouterr().err.count("cannot be written") == 1


# leftovers, locks and logs


def test_a_folder_with_nothing_but_leftovers_is_new(scripts, base, run, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.lock").touch()
    (tmp_path / "x" / "state.pth.0123456789ab.tmp").write_bytes(b"half")
    command = [*EXTEND, "--resume", base, "--save_path", tmp_path / "x"]
    assert scripts(*command) == 0
    assert_same_tensors(tmp_path / "x" / "loop_2.pth", run / "loop_2.pth")
    assert not list((tmp_path / "x").glob("*.tmp"))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "notes.tmp").touch()  # not ours
    assert scripts(*EXTEND, "--resume", base, "--save_path", tmp_path / "y") == 2
    assert "has no state.pth" in capsys.readouterr().err


def test_old_leftovers_go_with_the_next_file(tmp_path):
    old, young, other = (tmp_path / name for name in ("x.0123456789ab.tmp", "x.0123456789ac.tmp", "y.0123456789ab.tmp"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    with replacing(tmp_path / "x") as file:
        file.write(b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", young.name]
    # Once in a process: a folder may hold thousands of files.
    other.touch()
    os.utime(other, (0, 0))
    write_text(tmp_path / "x", "2")
    assert other.exists()


def test_a_file_that_is_read_just_now_is_replaced_a_moment_later(tmp_path, monkeypatch):
    original, tries = os.replace, []

    def locked(*paths):
        tries.append(paths)
        if len(tries) < 3:
            raise PermissionError(13, "in use")
        original(*paths)

    monkeypatch.setattr(files.os, "replace", locked)
    monkeypatch.setattr(files, "WAITS", (0.01,) * 4)  # as on Windows
    assert write_text(tmp_path / "x", "1").read_text() == "1" and len(tries) == 3
    monkeypatch.setattr(files, "WAITS", ())
    tries.clear()
    with pytest.raises(PermissionError, match="in use"):
        write_text(tmp_path / "x", "2")
    assert listing(tmp_path).keys() == {"x"} and (tmp_path / "x").read_text() == "1"


def test_what_others_write_in_the_folder_of_a_run_stays(tmp_path):
    theirs, own = "loop_1_mvtec.csv.0123456789ab.tmp", "state.pth.0123456789ab.tmp"
    for name in (theirs, own, "notes.tmp"):
        (tmp_path / name).touch()
    with folders.locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == [theirs, "notes.tmp"]


@pytest.mark.parametrize(
    "error",
    [Timeout("x"), NotImplementedError("no locks"), OSError(errno.ENOLCK, "no locks"), OSError(errno.ENOTSUP, "")],
)
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog, error):
    def acquire(self, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with folders.locked(tmp_path):
        assert "has no locks" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_what_keeps_a_lock_from_being_looked_at_is_no_lack_of_locks(tmp_path, monkeypatch):
    original = FileLock.acquire

    def full(self, **options):
        if Path(self.lock_file).name != folders.LOCK_FILE:
            raise OSError(errno.ENOSPC, "no space", self.lock_file)
        return original(self, **options)

    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / folders.LOCK_FILE):
        monkeypatch.setattr(FileLock, "acquire", full)
        with pytest.raises(OSError, match="no space"), folders.locked(tmp_path):
            pass
    (tmp_path / "x" / folders.LOCK_FILE).mkdir(parents=True)
    with pytest.raises(OSError, match=folders.LOCK_FILE), folders.locked(tmp_path / "x"):
        pass


def test_a_folder_in_use_is_refused(scripts, base, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.1)
    command = [*EXTEND, "--resume", base, "--save_path", tmp_path / "x"]
    (tmp_path / "x").mkdir()
    with FileLock(tmp_path / "x" / folders.LOCK_FILE):
        before = listing(tmp_path)
        monkeypatch.setattr("utils.training.start.load_training_data", None)  # nothing is read
        assert scripts(*command) == 2
        monkeypatch.undo()
        assert "another process trains there" in capsys.readouterr().err
        assert listing(tmp_path).keys() == before.keys()
    assert scripts(*command) == 0
    assert_same_tensors(tmp_path / "x" / "loop_2.pth", run / "loop_2.pth")


def test_what_another_process_did_meanwhile_is_not_overwritten(scripts, base, tmp_path, monkeypatch, capsys):
    original, command = folders.locked, [*EXTEND, "--resume", base, "--save_path", tmp_path / "x"]

    @contextlib.contextmanager
    def late(folder):
        monkeypatch.setattr("utils.training.trainer.locked", original)
        assert scripts(*command) == 0  # the other one begins and ends first
        with original(folder):
            yield

    monkeypatch.setattr("utils.training.trainer.locked", late)
    assert scripts(*command) == 2
    assert "another process trained there meanwhile" in capsys.readouterr().err
    assert scripts(*command) == 0


@pytest.fixture(scope="module")
def cut(base, data_root, tmp_path_factory) -> Path:
    """A run that was stopped in its third step."""
    original, calls = Trainer.train_step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    folder = tmp_path_factory.mktemp("runs") / "cut"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        assert Scripts(patched, data_root)(*EXTEND, "--resume", base, "--save_path", folder) == 1
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text("a,b\n1,2\n", encoding="utf-8"),
        lambda path: path.write_text(
            path.read_text(encoding="utf-8").replace("step,1,1", "step,x,1"), encoding="utf-8"
        ),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_log_stops_no_run(scripts, base, run, cut, tmp_path, capsys, damage):
    log = shutil.copytree(cut, tmp_path / "x") / "log.csv"
    damage(log)
    gone = not log.exists()
    assert scripts(*EXTEND, "--resume", base, "--save_path", log.parent) == 0
    assert ("set aside as log_damaged_" in capsys.readouterr().err) is not gone
    assert len(list(log.parent.glob("log_damaged_*.csv"))) == (0 if gone else 1)
    assert read_log(log.parent) and read_log(log.parent)[-1] == read_log(run)[-1]
    assert_same_tensors(tmp_path / "x" / "loop_2.pth", run / "loop_2.pth")


def test_a_log_goes_on_with_what_it_can_keep(scripts, base, run, cut, tmp_path, capsys):
    log = shutil.copytree(run, tmp_path / "x") / "log.csv"
    whole = log.read_text(encoding="utf-8")
    number = re.search(r",(-?\d+\.\d+)", whole)[1]
    whole = whole.replace(number, "-0.25", 1)  # which a spreadsheet would take for a formula
    log.write_text(whole, encoding="utf-8")
    command = [*EXTEND[:-2], "--resume", base, "--save_path", log.parent, "--loops"]
    assert scripts(*command, "3") == 0
    assert log.read_text(encoding="utf-8").startswith(whole) and "earlier epochs" not in capsys.readouterr().err
    rows = log.read_text(encoding="utf-8").splitlines()
    cut_short = [row for row in rows if not row.startswith("epoch,1,")]
    log.write_text("\n".join([f"{cut_short[0]},mine", *(f"{row},7" for row in cut_short[1:]), ""]), encoding="utf-8")
    assert scripts(*command, "4") == 0
    said = capsys.readouterr().err
    assert "columns of others; set aside as log_damaged_" in said
    assert f"the rows of {len(rows) - len(cut_short)} earlier epochs are lost" in said
    (aside,) = log.parent.glob("log_damaged_*.csv")
    assert ",mine" in aside.read_text(encoding="utf-8") and ",mine" not in log.read_text(encoding="utf-8")


def test_a_loop_that_is_lost_is_said(scripts, base, run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "x")
    (folder / "loop_1.pth").unlink()
    (folder / "loop_2.pth").write_bytes((folder / "loop_2.pth").read_bytes()[:500])
    assert scripts(*EXTEND, "--resume", base, "--save_path", folder) == 0
    said = capsys.readouterr().err
    assert "loop_1.pth is missing, and the run is past it" in said and "loop_2.pth is damaged" in said
    whole = (folder / "loop_0.pth").read_bytes()
    (folder / "loop_0.pth").write_bytes(whole[:500])
    assert scripts(*EXTEND, "--resume", base, "--save_path", folder) == 0
    assert "loop_0.pth is damaged" in capsys.readouterr().err
    assert scripts(*EXTEND[:-1], "3", "--resume", base, "--save_path", folder) == 0  # the base is at hand
    assert_same_tensors(folder / "loop_0.pth", run / "loop_0.pth")


def test_held_out_losses_that_are_no_numbers_end_a_run(scripts, tmp_path, monkeypatch, capsys):
    original = Trainer.losses

    def broken(self, *arguments):
        loss, terms = original(self, *arguments)
        return (loss, terms) if torch.is_grad_enabled() else (loss * torch.nan, terms)

    command = ["train", *SMALL, *EPOCHS, "--val_fraction", "0.5", "--save_path", tmp_path / "x"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "losses", broken)
        assert scripts(*command) == 1
    assert "loss is nan at" in (said := capsys.readouterr().err) and "held out" in said
    assert scripts(*command) == 0


def test_a_report_goes_without_the_curves_of_a_damaged_log(tmp_path, caplog):
    from utils.report.curves import draw_training

    (tmp_path / "log.csv").write_text("kind,loop,stage,epoch,loss\nepoch,1,1,1,much\n", encoding="utf-8")
    assert not draw_training(tmp_path / "log.csv", tmp_path / "x.png")
    assert "is damaged" in caplog.text and not (tmp_path / "x.png").exists()


# signals, workers, weights


@POSIX
@pytest.mark.parametrize("script", ["train_cross_attention", "test"])
def test_a_reading_process_that_is_killed_is_said_in_words(scripts, base, run, monkeypatch, tmp_path, capsys, script):
    original = AnomalyDataset.__getitem__

    def killed(self, key):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, key)

    monkeypatch.setattr(AnomalyDataset, "__getitem__", killed)
    command = [*EXTEND, "--resume", base, "--save_path", tmp_path / "x"]
    if script == "test":
        command = ["test", "--ckpt", run / "loop_1.pth", "--dataset", "small", "--device", "cpu"]
    assert scripts(*command, "--num_workers", 2) == 1
    said = capsys.readouterr().err
    assert "A process that reads images was killed" in said and "--num_workers" in said and "Traceback" not in said


@POSIX
def test_reading_processes_end_with_their_parent_alone(scripts, base, data_root, tmp_path):
    command = [sys.executable, "train_cross_attention.py", *EXTEND[1:], "--image_epoch", "20", "--num_workers", "2"]
    command += ["--resume", str(base), "--data_root", str(data_root), "--save_path", str(tmp_path / "x")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log, deadline = tmp_path / "x" / "log.csv", time.monotonic() + 120
    while not (log.exists() and "step,1,2" in log.read_text(encoding="utf-8")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Stopped by SIGTERM" in said and "Traceback" not in said
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_step_to_weights_that_are_no_numbers_is_not_saved(scripts, base, tmp_path, capsys):
    command = ["train", *SMALL, *EPOCHS, "--text_lr", "1e38", "--save_path", tmp_path / "x"]
    assert scripts(*command) == 1
    said = capsys.readouterr().err
    assert re.search(r"(update_text_adapter|loss|grad_norm_text_adapter) is (inf|nan)", said)
    state = torch.load(tmp_path / "x" / "state.pth", weights_only=True)
    for module in state["modules"].values():
        assert all(value.isfinite().all() for value in (module or {}).values())


def test_lists_of_what_was_drawn_come_back(scripts, base, tmp_path, monkeypatch):
    command = ["train", *SMALL, *EPOCHS, "--shot", "4", "--val_classes", "1", "--save_path", tmp_path / "x"]

    def broken(*arguments):
        raise KeyboardInterrupt  # as a kill between the state and the list

    with monkeypatch.context() as patched:
        patched.setattr("utils.training.trainer.write_records", broken)
        assert scripts(*command) == 1
    assert (tmp_path / "x" / "state.pth").is_file() and not (tmp_path / "x" / "4-shot.jsonl").exists()
    assert scripts(*command) == 0
    assert len((tmp_path / "x" / "4-shot.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "x" / "val_classes.txt").is_file()
