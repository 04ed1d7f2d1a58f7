"""Files that are written whole or not at all."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

# What a process that was killed may leave; no other file is called so.
TEMPORARY = re.compile(r".+\.[0-9a-f]{12}\.tmp")
# No file takes so long to write.
LEFTOVER_SECONDS = 3600


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
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    remove_leftovers(path.parent, path.name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError that names no file, as those of a full disk, is about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_leftovers(folder: Path, name: str = "", older_than: float = LEFTOVER_SECONDS) -> None:
    """Remove the temporary files, of files called `name` or of all, that killed processes left in a folder.

    Those younger than `older_than` seconds may be another process's work.
    """
    for path in folder.iterdir():
        if path.name.startswith(f"{name}." if name else "") and TEMPORARY.fullmatch(path.name):
            try:
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()
            except OSError:
                continue  # another process was faster, or may not be disturbed


def write_text(path: Path, text: str) -> Path:
    """Write a text, in UTF-8; what UTF-8 has no bytes for, as in names that are none, is written as an escape."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return path
