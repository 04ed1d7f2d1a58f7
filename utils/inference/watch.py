"""Files of a folder that fills up, each once it is whole."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from utils.inference.images import images_below

logger = logging.getLogger(__name__)

# Seconds between two looks at the folder, or as many as a look takes.
POLL = 0.2
# A file that was seen not to change for so many seconds is taken for whole.
SETTLED = 1.0
# So is one that was written longer ago than the clocks of two machines differ, as those that are moved here.
OLD = 5.0
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
        started = time.monotonic()
        if there != folder.is_dir():
            there = not there
            logger.warning("%s is %s", folder, "there again." if there else "gone. Waiting for it.")
        if there:
            waiting.look(folder)
        took = time.monotonic() - started
        for path, last in waiting.due():
            if stopped():
                return
            waiting.done(path, judge(path, last))
        time.sleep(max(POLL, took))


class _Waiting:
    """What is known of the files of a folder: which are done, and since when the others are as they are."""

    def __init__(self) -> None:
        self.finished: dict[Path, Stamp] = {}
        self.since: dict[Path, tuple[Stamp, float]] = {}
        self.tried: dict[Path, Stamp] = {}

    def look(self, folder: Path) -> None:
        """See which files are there; those that are gone may come again."""
        failures: list[OSError] = []
        found = {path: stamp for path in images_below(folder, None, failures.append)[0] if (stamp := _stamp(path))}
        now = time.monotonic()
        for path, stamp in found.items():
            if self.since.get(path, (None,))[0] != stamp:
                self.since[path] = stamp, now
        if failures:  # a folder on a network that does not answer is not empty
            return
        for known in (self.finished, self.since, self.tried):
            for path in known.keys() - found.keys():
                del known[path]

    def due(self) -> Iterator[tuple[Path, bool]]:
        """Files to be judged now, by the time they were written, and whether it is the last time."""
        waiting = [(path, stamp) for path, (stamp, _) in self.since.items() if self.finished.get(path) != stamp]
        for path, stamp in sorted(waiting, key=lambda entry: entry[1].written):
            if _stamp(path) != stamp:
                continue  # it changed while others were judged
            rested = time.monotonic() - self.since[path][1]
            if self.tried.get(path) == stamp or not stamp.size:  # as files are before they are written
                if rested >= PATIENCE:
                    yield path, True
            elif rested >= SETTLED or time.time() - stamp.written / 1e9 >= OLD:
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
