"""The processes of one job, as torchrun starts them (https://docs.pytorch.org/docs/stable/elastic/run.html).

Where there is one process, it is the first of one, and all that is asked here is what it is without the others; PyTorch
is imported where there are others.
"""

from __future__ import annotations

import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

# All that torchrun tells a process, which together say that there are others.
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Minutes that processes wait to find each other, and then for what another one does alone.
TO_MEET, TO_WAIT = 5, 30
# Where the process that says why the job ends leaves its number and its words, and how many others have ended.
SPEAKER, WORDS, LEFT = "speaker", "words", "left"
# Seconds that the process which holds these stays for the others.
TO_HEAR = 2

_store: Any = None  # what all processes can read and write, while they are joined


def _told(name: str, alone: int) -> int:
    return int(os.environ[name]) if all(other in os.environ for other in TOLD) else alone


def count() -> int:
    """How many processes the job has."""
    return _told("WORLD_SIZE", 1)


def number() -> int:
    """Which of them this one is, from 0."""
    return _told("RANK", 0)


def count_here() -> int:
    """How many of them run on this machine."""
    return _told("LOCAL_WORLD_SIZE", 1)


def number_here() -> int:
    """Which of those this one is, from 0."""
    return _told("LOCAL_RANK", 0)


def is_first() -> bool:
    """Whether this process writes files and speaks for all."""
    return number() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes of the job are connected. Raises ValueError where they do not find each other."""
    global _store
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        _store, *_ = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=TO_MEET))))
        dist.init_process_group(
            backend, store=_store, rank=number(), world_size=count(), timeout=timedelta(minutes=TO_WAIT)
        )
        wait()
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"{count()} processes were to meet at {where}, and process {number()} did not find the others, or the port "
            "is in use. Start all machines with the same --nnodes and --rdzv_endpoint, and choose a port that is free "
            f"(torchrun --standalone finds one itself). ({str(error).splitlines()[0][:200]})"
        ) from error
    yield
    # Not where something failed: the others learn of it by the connections that end with this process.
    dist.destroy_process_group()
    _store = None


def speaks(words: str) -> bool:
    """Whether this process is the one that says why the job ends: the first that asks. Others find its words."""
    if _store is None:
        return True
    own = str(number())
    try:
        speaker = _store.compare_set(SPEAKER, "", own).decode()
        if speaker == own:
            _store.set(WORDS, words)
    except RuntimeError:  # it went with the process that held it
        return True
    return speaker == own


def spoken() -> str:
    """What another process said of why the job ends."""
    try:
        _store.wait([WORDS], timedelta(seconds=1))
        return _store.get(WORDS).decode()
    except RuntimeError:
        return "Another process said why the job ends."


def leave() -> None:
    """Before this process ends by a failure: the first one, whose store all read unless torchrun has it, goes last."""
    if _store is None:
        return
    end = time.monotonic() + TO_HEAR
    with suppress(RuntimeError):  # it went with the process that held it
        if not is_first():
            _store.add(LEFT, 1)
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            while _store.add(LEFT, 0) < count() - 1 and time.monotonic() < end:
                time.sleep(0.02)


def lost_words(error: RuntimeError) -> str | None:
    """What an error says to a user where another process is gone; None for any other error."""
    if count() == 1:
        return None
    import torch.distributed as dist

    if not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
        return None
    if "imed out" in str(error):
        return f"Another process of this job was not heard of for {TO_WAIT} minutes: it hangs, or its machine is gone."
    reason = shorten(re.sub(r"\[\S+\.cc:\d+\] ", "", str(error)), 120)  # without where it is in PyTorch's source
    return f"Another process of this job is gone: killed, perhaps for its memory, or with its machine. ({reason})"


def versions() -> dict[str, str]:
    """Of Python and of what results depend on."""
    names = ("torch", "torchvision", "open_clip_torch", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def check_alike(values: Callable[[], Mapping[str, object]]) -> None:
    """Raise ValueError, in every process, where versions or one of the values are not the same in all.

    Alone, nothing is asked for: hashes of weights take time.
    """
    if count() == 1:
        return
    everywhere = for_all({name: str(value) for name, value in {**versions(), **values()}.items()})
    for other, found in enumerate(everywhere):
        for name, value in everywhere[0].items():
            if found.get(name) != value:
                shown = [shorten(str(one), 80) for one in (value, found.get(name))]
                raise ValueError(
                    f"The processes of this job differ in {name}: {shown[0]} in process 0, {shown[1]} in process "
                    f"{other}. Start all of them by the same command, with the same versions and the same files."
                )


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, which alone calls it."""
    if count() == 1:
        return make()
    import torch.distributed as dist

    made: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(made)
    return made[0]


def once_here(make: Callable[[], T]) -> T:
    """What `make` gives; where all processes are on one machine, the first alone calls it."""
    return from_first(make) if count() == count_here() else make()


@contextmanager
def first_ahead() -> Iterator[None]:
    """The first process does what is within it before the others begin: they find what it left on the disk."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def share() -> str:
    """Behind what a progress bar of this process counts, where others have their own."""
    return f" (1 of {count()} parts)" if count() > 1 else ""


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        import torch

        total(torch.zeros(1))


def total(values: Tensor) -> Tensor:
    """The sum over all processes, element by element, without gradient."""
    if count() == 1:
        return values
    import torch.distributed as dist

    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed


def for_first(value: T) -> list[T]:
    """What each process has, in their order, for the first process; an empty list for the others."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] | None = [None] * count() if is_first() else None
    dist.gather_object(value, found)
    return found or []


def for_all(value: T) -> list[T]:
    """What each process has, in their order."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def own_turns(things: Iterable[T]) -> Iterator[T]:
    """Of things that the processes take in turns, those of this one."""
    return islice(things, number(), None, count())


def bounds(length: int, part: int, parts: int) -> tuple[int, int]:
    """First and last (not included) of `length` things that are in that of `parts` nearly equal parts."""
    return length * part // parts, length * (part + 1) // parts


def joined_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows of all processes, one below the other, from `lengths` rows of each; more of its own are left out."""
    if count() == 1:
        return rows
    import torch
    import torch.distributed as dist

    own = rows.new_zeros((max(lengths), *rows.shape[1:]))
    own[: lengths[number()]] = rows[: lengths[number()]]
    found = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(found, own)
    return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])


def with_mean_gradients(module: nn.Module, all_used: bool) -> nn.Module:
    """A module whose gradients become the mean over the processes in each backward pass; alone, the module itself.

    `all_used`: every step gives a gradient to all parameters that have one.
    """
    if count() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():
        # A newer name of broadcast_buffers does more: it sends the frozen CLIP around, which all have.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, find_unused_parameters=not all_used, init_sync=False, broadcast_buffers=False
        )
