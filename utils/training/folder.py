"""The folder of a run: held by one process at a time, and what an earlier one left there."""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from dataset.files import TEMPORARY, remove_leftovers
from dataset.sets import is_path
from model.config import ModelConfig
from utils import checkpoints
from utils.options import completed
from utils.schema import RunState, expect
from utils.settings import Settings
from utils.training.plan import VAL_CLASSES_FILE, Plan, Position, Stage

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
# How a file system without locks puts it.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
# Files that a training writes.
OWN_FILES = ("*.pth", "log.csv", "training.png", VAL_CLASSES_FILE, "*-shot*.jsonl")
# Measures of every step, which the log reads.
LOGGED = {"loss", "anchor_separation", "emptied_masks"}
# The reading processes of a run that was killed hold its lock until they notice.
LOCK_SECONDS = 10


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it no other process trains in `folder`, which is made where it is not there.

    The lock ends with its process. Raises ValueError where another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        if not _acquired(lock):
            _check_unlockable(folder)
            logger.warning("%s: this file system has no locks, so do not train there twice at once.", folder)
        remove_leftovers(folder, OWN_FILES, older_than=0)
        yield
    finally:
        lock.release()


def check_free(folder: Path) -> None:
    """Raise ValueError where another process trains in a folder, before anything is read."""
    if (folder / LOCK_FILE).exists():
        lock = FileLock(folder / LOCK_FILE)
        try:
            if not _acquired(lock):
                _check_unlockable(folder)
        finally:
            lock.release()


def _acquired(lock: FileLock, seconds: float | None = None) -> bool:
    """Whether a lock was got. Raises OSError for what has nothing to do with locks, a full disk say."""
    try:
        lock.acquire(timeout=LOCK_SECONDS if seconds is None else seconds)
    except (Timeout, NotImplementedError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _check_unlockable(folder: Path) -> None:
    """Raise ValueError where the lock of a folder was not got because another process has it.

    That is so where a file that nobody else knows can be locked; versions of filelock tell it in different ways.
    """
    path = folder / f"{LOCK_FILE}.{uuid4().hex[:12]}.tmp"
    lock = FileLock(path)
    try:
        if not _acquired(lock, seconds=0):
            return
    finally:
        lock.release()
        path.unlink(missing_ok=True)
    raise ValueError(
        f"{folder}: another process trains there (it holds {LOCK_FILE}). Wait for it, or take another --save_path."
    )


def open_run(plan: Plan) -> dict | None:
    """The state of a run that has begun, or None for a new one. Writes nothing.

    A folder with nothing in it but what a process that was killed in its first save leaves is a new one. Raises
    ValueError where the folder holds anything else, or a run of another base, other arguments or more loops.
    """
    folder, header = plan.folder, plan.header
    if not folder.exists() or (folder.is_dir() and all(map(_is_left_over, folder.iterdir()))):
        return None
    loops = checkpoints.loop_files(folder)
    rescue = f", or go on from {loops[-1]} with --resume, a new --save_path and more --loops" if loops else ""
    path = folder / checkpoints.STATE_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file. Choose another --save_path.")
    if not path.is_file():
        raise ValueError(
            f"{folder} exists and has no {path.name}, so no run goes on there. Choose another --save_path{rescue}."
        )
    try:
        state = expect(RunState, checkpoints.read(path), path)
    except ValueError as error:
        raise ValueError(f"{error} Choose another --save_path{rescue}.") from error
    if _origin(state) != _origin(header):
        raise ValueError(
            f"{folder} holds a run that started from another base, {state['base']}. Choose another --save_path."
        )
    if changed := differences(state["config"], header["config"]):
        raise ValueError(
            f"{folder} holds a run with other arguments:\n"
            + "\n".join(changed)
            + "\nRepeat the earlier ones to go on, or choose another --save_path."
        )
    finished = state["position"][0] - 1
    if plan.last_loop < finished:
        raise ValueError(f"--loops {plan.last_loop}: the run in {folder} already has {finished} loops.")
    return state


def _is_left_over(path: Path) -> bool:
    return path.name == LOCK_FILE or TEMPORARY.fullmatch(path.name) is not None


def check_unchanged(plan: Plan, state: dict | None) -> None:
    """Raise ValueError where a run is no longer where its `state` (None: a new one) said, before the lock was held."""
    now = open_run(plan)
    if (now and now["position"]) != (state and state["position"]):
        raise ValueError(f"{plan.folder}: another process trained there meanwhile. Start again to go on from there.")


def check_state(state: dict, plan: Plan, modules: list[str], steps_per_epoch: Callable[[Stage], int]) -> None:
    """Raise ValueError where a state, whose types are right, is none that this plan comes to."""
    position = Position(*state["position"])
    stage = next((stage for stage in plan.stages if (stage.loop, stage.name) == position[:2]), None)
    fits = stage is not None and position.epoch <= stage.epochs and position.step <= steps_per_epoch(stage)
    fits &= all(state["modules"].get(name) for name in modules)
    if position.epoch or position.step:
        fits &= position.stage in state["optimizers"]
    if position.step:
        fits &= state["means"].keys() >= LOGGED
    if position.epoch:
        fits &= state["metrics"].get(position.stage, {}).keys() >= LOGGED
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state["rng"])
    except (RuntimeError, TypeError):
        fits = False
    if not fits:
        path = plan.folder / checkpoints.STATE_FILE
        raise ValueError(f"{path}: no state that this run comes to, at {position}. Choose another --save_path.")


def _origin(header: dict) -> tuple:
    """Hashes of the files that a run starts from."""
    base = header.get("base", {})
    return base.get("sha256"), base.get("continued_from", {}).get("sha256")


def differences(before: dict, now: dict) -> list[str]:
    """A line for each argument of a run that is not what it was."""
    pairs = (
        (completed(ModelConfig, before["model"]), now["model"]),
        (completed(Settings, before["training"]), now["training"]),
    )
    return [
        f"  {name}: {old.get(name)} before, {new.get(name)} now"
        for old, new in pairs
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not (name == "dataset" and _is_one_place(old[name], new[name]))
    ]


def _is_one_place(before: str, now: str) -> bool:
    """Whether two data sets are given by the path of one folder or list."""
    return is_path(before) and is_path(now) and Path(before).resolve() == Path(now).resolve()


def check_data(state: dict, found: dict, folder: Path) -> None:
    """Raise ValueError where the images of a run that goes on are not those it began with."""
    recorded = state.get("data", found)  # older runs do not tell
    if recorded != found:
        raise ValueError(
            f"{folder}: this run began with {recorded['images']} images to train on and {recorded['held_out']} held "
            f"out; now there are {found['images']} and {found['held_out']}, or others of the same number (where images "
            "were added, --shot draws others). Bring back the folder as it was to go on, or choose another --save_path."
        )
