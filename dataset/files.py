"""Files that are written whole or not at all."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

# What a process that was killed may leave; no other file is called so.
TEMPORARY = re.compile(r".+\.[0-9a-f]{12}\.tmp")
# No file takes so long to write.
LEFTOVER_SECONDS = 3600
# How long a file waits for its place, in seconds, try by try: on Windows none takes that of one that is just read.
WAITS = (0.05, 0.2, 0.5, 1.0) if os.name == "nt" else ()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all is written: a crash leaves the old one or the new one.

    What fails leaves no temporary file; what a killed process left is removed. An OSError names the file.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            replace_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    _clean(path.parent)


def replace_file(temporary: Path, path: Path) -> None:
    """Put a file in the place of another, which on Windows may take some tries."""
    for wait in WAITS:
        try:
            os.replace(temporary, path)
        except PermissionError:
            time.sleep(wait)
        else:
            return
    os.replace(temporary, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError that names no file, as those of a full disk, is about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@cache
def _clean(folder: Path) -> None:
    """Remove leftovers, once in a process: a folder may hold thousands of files."""
    remove_leftovers(folder)


def remove_leftovers(folder: Path, names: tuple[str, ...] = ("*",), older_than: float = LEFTOVER_SECONDS) -> None:
    """Remove the temporary files, of files called as one of the patterns `names`, that killed processes left.

    Those younger than `older_than` seconds may be another process's work.
    """
    try:
        there = list(folder.iterdir())
    except PermissionError:  # a folder that may be written to, not listed
        return
    for path in there:
        if TEMPORARY.fullmatch(path.name) and any(fnmatch(path.name, f"{name}.*.tmp") for name in names):
            try:
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()
            except OSError:
                continue  # another process was faster, or may not be disturbed


def nearest_there(folder: Path) -> Path:
    """A folder, or the nearest one above it, that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))


def check_place(folder: Path, flag: str) -> None:
    """Raise ValueError, with the flag that named it, where a folder is none, or cannot be written to or made."""
    nearest = nearest_there(folder)
    if not nearest.is_dir():
        raise ValueError(f"{flag} {folder}: {nearest} is no folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {folder}: no permission to write to {nearest}.")


def write_text(path: Path, text: str) -> Path:
    """Write a text, in UTF-8; what UTF-8 has no bytes for, as in names that are none, is written as an escape."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return path
