"""Logging: console and train.log, and progress bars that get along with them."""

import logging
import sys
from collections.abc import Iterable
from logging.handlers import MemoryHandler
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

from dataset.commands import PlainFormatter
from dataset.words import printable
from model.config import REPOSITORY
from utils import processes


class _TqdmHandler(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if processes.is_first():
                tqdm.write(self.format(record), file=sys.stderr)
            else:  # which has errors alone to say, below the bar of the first
                print("", self.format(record), sep="\n", file=sys.__stderr__)
        except OSError:
            self.handleError(record)  # a terminal that is gone ends no training


class _FileHandler(logging.FileHandler):
    """Says once where it cannot write, on a full disk say; training goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def own_loggers() -> list[str]:
    """Names that the loggers of this program begin with: its scripts and packages, whichever there are."""
    modules = [path.stem for path in REPOSITORY.glob("*.py")]
    packages = [path.parent.name for path in REPOSITORY.glob("*/__init__.py")]
    return ["__main__", *modules, *packages]


def setup_logging() -> None:
    """Messages of the program to stderr; other libraries' from warnings on."""
    # Bars are drawn by one process alone; tqdm's own lock is shared with those that it starts, and one that is killed
    # while it holds it would stop all others.
    tqdm.set_lock(RLock())
    logging.captureWarnings(True)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    handler = _TqdmHandler()
    handler.setFormatter(PlainFormatter("%(message)s"))
    handler.setLevel(logging.INFO if processes.is_first() else logging.ERROR)
    root.addHandler(handler)
    # Keeps what is said before there is a folder to log to.
    root.addHandler(MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1))
    root.setLevel(logging.WARNING)
    for name in own_loggers():
        logging.getLogger(name).setLevel(logging.DEBUG)


def log_to_file(path: Path) -> None:
    """Append messages to `path` too, with their time; those before this call as well."""
    handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    for earlier in root.handlers[:]:
        if isinstance(earlier, MemoryHandler):
            earlier.setTarget(handler)
            earlier.close()  # which hands on what it holds
            root.removeHandler(earlier)


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar; where stderr is no terminal it writes a line every half minute at most."""
    if not sys.stderr.isatty():
        options["mininterval"] = 30
    if "desc" in options:
        options["desc"] = printable(options["desc"])
    return tqdm(iterable, dynamic_ncols=True, **options)
