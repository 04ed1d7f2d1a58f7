"""Files of a folder that fills up, each once it is whole."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from utils.inference.images import images_below

logger = logging.getLogger(__name__)

# Seconds between two looks at the folder.
POLL = 0.2
# A file that was not written to for so many seconds is taken for whole. One that is moved here is so at once.
SETTLED = 1.0
# What cannot be read may be half of a file whose writer rests; so many seconds are waited for more of it.
PATIENCE = 10.0


class Stamp(NamedTuple):
    """What changes with a file's content."""

    inode: int
    size: int
    written: int


def watch(folder: Path, judge: Callable[[Path, bool], bool], stopped: Callable[[], bool]) -> None:
    """Hand images of a folder, and of those within it, to `judge` as they come, the earliest first, until `stopped`.

    `judge` is told the file, and whether it is tried for the last time; it returns whether that was done with. A file
    that was not is tried again when it has changed, or for the last time when it has not for PATIENCE seconds. Files
    that are there already come first; one that is replaced comes again.
    """
    waiting = _Waiting()
    there = True
    while not stopped():
        if there != folder.is_dir():
            there = not there
            logger.warning("%s is %s", folder, "there again." if there else "gone. Waiting for it.")
        for path, last in waiting.due(folder):
            if stopped():
                return
            waiting.done(path, judge(path, last))
        time.sleep(POLL)


class _Waiting:
    """What is known of the files of a folder: which are done, and since when the others are as they are."""

    def __init__(self) -> None:
        self.finished: dict[Path, Stamp] = {}
        self.since: dict[Path, tuple[Stamp, float]] = {}
        self.tried: dict[Path, Stamp] = {}

    def due(self, folder: Path) -> Iterator[tuple[Path, bool]]:
        """Files to be judged now, by the time they were written, and whether it is the last time."""
        found = {path: stamp for path in images_below(folder, None)[0] if (stamp := _stamp(path))}
        for known in (self.finished, self.since, self.tried):
            for path in known.keys() - found.keys():
                del known[path]  # it may come again
        for path, stamp in sorted(found.items(), key=lambda entry: entry[1].written):
            if self.finished.get(path) == stamp:
                continue
            if self.since.get(path, (None,))[0] != stamp:
                self.since[path] = stamp, time.monotonic()
            rested = time.monotonic() - self.since[path][1]
            if self.tried.get(path) == stamp or not stamp.size:  # as files are before they are written
                if rested >= PATIENCE:
                    yield path, True
            elif rested >= SETTLED or time.time() - stamp.written / 1e9 >= SETTLED:
                yield path, False

    def done(self, path: Path, read: bool) -> None:
        """Remember what became of a file that was due."""
        stamp = self.since[path][0]
        if read or not stamp.size or self.tried.get(path) == stamp:
            self.finished[path] = stamp
        else:
            self.tried[path] = stamp


def _stamp(path: Path) -> Stamp | None:
    """The stamp of a file, None where it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)
