"""Logging: console and train.log, log.csv, and progress bars that get along with both."""

import csv
import logging
import os
import sys
from collections.abc import Callable, Iterable
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Loggers of this program: its scripts and packages.
PROGRAM = ("pretrain_demo", "train", "train_cross_attention", "test", "predict", "model", "dataset", "utils")


class _TqdmHandler(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging() -> None:
    """Messages of the program to stderr; other libraries' from warnings on."""
    logging.captureWarnings(True)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO)
    root.addHandler(handler)
    # Keeps what is said before there is a folder to log to.
    root.addHandler(MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1))
    root.setLevel(logging.WARNING)
    for name in PROGRAM:
        logging.getLogger(name).setLevel(logging.DEBUG)


def log_to_file(path: Path) -> None:
    """Append messages to `path` too, with their time; those before this call as well."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    for earlier in [each for each in root.handlers if isinstance(each, MemoryHandler)]:
        earlier.setTarget(handler)
        earlier.close()  # which hands on what it holds
        root.removeHandler(earlier)


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A progress bar; where stderr is no terminal it writes a line every half minute at most."""
    if not sys.stderr.isatty():
        options["mininterval"] = 30
    return tqdm(iterable, dynamic_ncols=True, **options)


def tensorboard_writer() -> Callable:
    """TensorBoard's writer: called with a folder, it writes there. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard: the package is not installed (pip install tensorboard). log.csv is written without it."
        ) from error
    return SummaryWriter


class CsvLog:
    """A CSV file with fixed columns; each row is on disk when `write` returns. Numbers are written in full.

    Where another program locks the file (a spreadsheet on Windows), rows wait for the next `write` that succeeds.
    """

    def __init__(self, path: Path, columns: list[str]):
        self.path, self.columns = path, columns
        self.waiting: list[dict] = []

    def open(self, keep: Callable[[dict[str, str]], bool]) -> None:
        """Start the file, or go on with one, keeping the rows that `keep` accepts."""
        rows = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values() and keep(row)]
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    def write(self, row: dict) -> None:
        """Append a row; columns that it lacks stay empty."""
        self.waiting.append(row)
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(self.waiting)
        except PermissionError as error:
            logger.warning("%s cannot be written, its rows wait: %s", self.path, error)
        else:
            self.waiting.clear()
