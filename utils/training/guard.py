"""While a training goes on: signals are obeyed without loss, and errors say what is saved and what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch

from utils import processes
from utils.errors import LOST_WORKER, TrainingError, message_of
from utils.signals import StopSignal

# How PyTorch's CPU allocator puts it, on every system.
OUT_OF_MEMORY = "you tried to allocate"
# Of a failure that has its cause elsewhere.
WHOLE = "The last state is whole, in {}: the same command goes on from there."


@contextmanager
def guarded(folder: Path, doing: Callable[[], str], rescue: Callable[[], None]) -> Iterator[StopSignal]:
    """Within it, SIGINT and SIGTERM are noted, and what fails raises TrainingError; the last state is in `folder`.

    `doing()` tells, for an error of memory, what was tried and what to try instead; `rescue()` saves what it can where
    another process of the job is gone.
    """
    with StopSignal() as stop:
        try:
            yield stop
        except (ValueError, OSError) as error:  # of reading images and writing files
            raise TrainingError(f"{message_of(error)} The last state is whole, in {folder}.") from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise TrainingError(_out_of_memory(doing(), folder, error)) from error
        except RuntimeError as error:
            if lost := processes.lost_words(error):
                rescue()
                raise TrainingError(f"{lost} {WHOLE.format(folder)}") from error
            if str(error).startswith(LOST_WORKER):
                raise TrainingError(f"{message_of(error)} {WHOLE.format(folder)}") from error
            if OUT_OF_MEMORY not in str(error):
                raise
            raise TrainingError(_out_of_memory(doing(), folder, error)) from error


def _out_of_memory(doing: str, folder: Path, error: BaseException) -> str:
    return (
        f"Out of memory at {doing}, or with --precision bf16.\n"
        f"The last state is in {folder}.\n({shorten(str(error), 160)})"
    )
