"""How a script ends: 0 when all went well, 2 for an error before training, 1 for one during it."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from dataset.commands import reader_left
from utils import processes
from utils.errors import LOST_WORKER, TrainingError, TrainingStoppedError, is_out_of_memory, message_of
from utils.logs import setup_logging
from utils.signals import end_by_words, ignore_signals, stopped_by

logger = logging.getLogger(__name__)


@contextmanager
def _heard() -> Iterator[None]:
    """Within it the first process of a job prints and draws progress bars; the others have errors alone to say."""
    if processes.is_first():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield


def _end(code: int, text: str, level: int = logging.ERROR) -> int:
    """Say why the job ends, or to its log alone where another process has said so; its exit code."""
    if processes.speaks(text):
        logger.log(level if processes.is_first() else logging.ERROR, "%s", text)
    else:
        logger.debug("%s\n%s", processes.spoken(), text)
    if level == logging.ERROR:
        logger.debug("Where it happened:", exc_info=True)
    return code


def run_script(main: Callable[[], int | None], several: bool = True) -> None:
    """Run `main` and exit with what it returns (None: 0), or with one clear message where the input is at fault.

    ValueError and OSError are bad input here: the modules raise them with what was expected and what was found. Their
    traceback goes to train.log where there is one. Any other exception is a fault of the program and keeps its own.
    `several`: whether torchrun may start it; one of the processes then says why all end.
    """
    setup_logging()
    # A table that is redirected to a file on Windows may hold names that its encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    shared = processes.count() > 1
    if shared:
        end_by_words()
    try:
        if shared and not several:
            raise ValueError("this program runs in one process: start it without torchrun.")
        with processes.joined(), _heard():
            code = main() or 0
        sys.stdout.flush()
    except TrainingStoppedError as error:
        code = _end(1, str(error), logging.WARNING)
    except TrainingError as error:
        code = _end(1, f"error: {error}")
    except BrokenPipeError:
        code = reader_left()
    except (ValueError, OSError) as error:
        code = _end(2, f"error: {message_of(error)}")
    except RuntimeError as error:
        if is_out_of_memory(error):  # outside training, which says more of its own
            lost: str | None = f"out of memory. Try a smaller --batch_size, or --precision bf16. ({error})"
        else:
            lost = message_of(error) if str(error).startswith(LOST_WORKER) else processes.lost_words(error)
        if lost is None:
            processes.speaks(repr(error))
            raise
        code = _end(1, f"error: {lost}")
    except KeyboardInterrupt as error:
        code = _end(1, f"{stopped_by(str(error)) if str(error) else 'Stopped'}.")
    except Exception as error:  # a fault of the program: its traceback says why the job ends
        processes.speaks(repr(error))
        raise
    finally:
        if shared:
            ignore_signals()
            processes.leave()
    sys.exit(code)
