"""How a script ends: 0 when all went well, 2 for an error before training, 1 for one during it."""

import io
import logging
import sys
from collections.abc import Callable

import torch

from dataset.commands import reader_left
from utils.errors import LOST_WORKER, TrainingError, TrainingStoppedError, message_of
from utils.logs import setup_logging

logger = logging.getLogger(__name__)


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with what it returns (None: 0), or with one clear message where the input is at fault.

    ValueError and OSError are bad input here: the modules raise them with what was expected and what was found. Their
    traceback goes to train.log where there is one. Any other exception is a fault of the program and keeps its own.
    """
    setup_logging()
    # A table that is redirected to a file on Windows may hold names that its encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except TrainingStoppedError as error:
        logger.warning("%s", error)
        code = 1
    except TrainingError as error:
        logger.error("error: %s", error)
        logger.debug("Where it happened:", exc_info=True)
        code = 1
    except BrokenPipeError:
        code = reader_left()
    except (ValueError, OSError) as error:
        logger.error("error: %s", message_of(error))
        logger.debug("Where it happened:", exc_info=True)
        code = 2
    except torch.OutOfMemoryError as error:  # outside training, which says more of its own
        logger.error("error: out of memory. Try a smaller --batch_size, or --precision bf16. (%s)", error)
        code = 1
    except RuntimeError as error:
        if not str(error).startswith(LOST_WORKER):
            raise
        logger.error("error: %s", message_of(error))
        code = 1
    except KeyboardInterrupt:
        logger.error("Stopped.")
        code = 1
    sys.exit(code)
