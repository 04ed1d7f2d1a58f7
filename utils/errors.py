"""How a training ends before it is done, and what is said of an error."""

import errno
import sys

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
# How PyTorch begins where a process that reads images is gone.
LOST_WORKER = "DataLoader worker"


class TrainingError(RuntimeError):
    """Training failed; the last saved state is intact."""


class TrainingStoppedError(TrainingError):
    """Training was stopped by a signal; its state is saved."""


def message_of(error: Exception) -> str:
    """What an error of reading or writing says to a user."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"The disk is full: {error.filename} could not be written. Make room, and start again."
    if str(error).startswith(LOST_WORKER):
        return (
            "A process that reads images was killed, perhaps for its memory: try a smaller --num_workers. "
            f"({str(error).splitlines()[0]})"
        )
    return loader_message(error)


def loader_message(error: Exception) -> str:
    """Message of an error, without the traceback that PyTorch puts around one from a worker process."""
    return str(error).rpartition(f"\n{type(error).__name__}: ")[2].strip()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, where it is imported, ran out of memory."""
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)
