"""Kill trainings within what they write and at any moment, start them again, and compare what comes out.

    python -m benchmarks.faults                                    # 200 kills, 40 signals
    python -m benchmarks.faults --kills 20 --signals 4

A small training (two loops, on the demo model) runs once as a whole; the files it opens, fills, renames and makes are
noted. Then it is killed: at each of these events in turn, those of the first save before all others, in every second
kill after half of the file is written; and at random moments. Or a signal reaches its whole process group, reading
processes included. Run again to its end, every tensor and every row of its log must be those of the whole run.
Exit code 1 where one is not. POSIX alone: processes are forked, so that 200 kills take minutes.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

import train
import train_cross_attention
from dataset.constants import DATA_SETS
from dataset.demo.render import render
from dataset.records import Record, write_records
from utils.arguments import make_parser
from utils.checkpoints import loop_files, read
from utils.cli import run_script
from utils.files import read_csv
from utils.logs import progress
from utils.options import at_least

PRODUCTS = ("bolt", "coin")
WORDS = ["--device", "cpu", "--text_epoch", "1", "--image_epoch", "1", "--text_batch_size", "4"]
# What every second kill at an event of this kind leaves half of.
WRITTEN = "written"


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=at_least(1), default=200, help="half of them at file events, half at any time")
    parser.add_argument("--signals", type=at_least(0), default=40, help="signals to the whole group of processes")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the moments")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="trainings side by side")
    return parser.parse_args()


# one training


def small_data(root: Path) -> None:
    """Two products of the demo, three good and three damaged images each."""
    records = []
    for product in PRODUCTS:
        for number in range(6):
            drawn = render(product, number % 2 == 1, (7, list(DATA_SETS["demo_train"].classes).index(product), number))
            path, mask = f"{product}_{number}.png", f"{product}_{number}_mask.png" if number % 2 else None
            for name, pixels in ((path, drawn.image), (mask, drawn.mask)):
                if name:
                    Image.fromarray(pixels).save(root / "small" / name)
            records.append(Record(path, number % 2, product, mask))
    write_records(root / "small" / "full-shot.jsonl", records)


def nothing() -> None:
    """Before and after what is run."""


def forked(
    script: ModuleType, words: list[str], before: Callable[[], None] = nothing, after: Callable[[], None] = nothing
) -> int:
    """Run a script in a process of its own, in a group of its own; its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70  # of whatever is no end of a script
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        before()
        sys.argv = [f"{script.__name__}.py", *words]
        try:
            run_script(script.main)
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        after()
        os._exit(code)


def finish(process: int) -> int:
    """How a process ended: its exit code, or less than 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# where it is killed


class Watch:
    """Counts what a process does to files in `folder`, and kills it at event number `last`; None: notes all events."""

    def __init__(self, folder: Path, last: int | None = None, half: bool = False):
        self.folder, self.last, self.half = str(folder), last, half
        self.events: list[str] = []

    def __call__(self) -> None:
        """Begin, in the process that is watched."""
        sys.addaudithook(self._hear)
        flush = os.fsync

        def fsync(file: int) -> None:
            self._note(WRITTEN, os.readlink(f"/proc/self/fd/{file}"), file)
            flush(file)

        os.fsync = fsync  # type: ignore[assignment]

    def _hear(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._note("open", arguments[0])
        elif event in ("os.rename", "os.mkdir", "os.remove"):
            self._note(event.removeprefix("os."), arguments[0])

    def _note(self, event: str, path: object, file: int | None = None) -> None:
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.folder):
            return
        self.events.append(f"{event} {Path(path).name.split('.')[0] or 'folder'}")
        if len(self.events) - 1 == self.last:
            if file is not None and self.half:
                os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def report(self) -> None:
        """Leave the events beside the folder."""
        Path(f"{self.folder}.events").write_text(json.dumps(self.events), encoding="utf-8")


def same(first: Path, second: Path) -> bool:
    """Whether two runs have the same loop files, to the last bit, and the same log but for the time it took."""
    if [path.name for path in loop_files(first)] != [path.name for path in loop_files(second)]:
        return False
    for path in loop_files(first):
        mine, other = read(path), read(second / path.name)
        for name in ("text_adapter", "image_adapter", "text_cross_attn", "image_cross_attn"):
            if mine[name].keys() != other[name].keys():
                return False
            if not all(torch.equal(mine[name][key], other[name][key]) for key in mine[name]):
                return False
    logs = [[row | {"seconds": ""} for row in read_csv(run / "log.csv", ("seconds",))] for run in (first, second)]
    return logs[0] == logs[1]


# the campaign


class Campaign:
    """Trainings of `words`, each in a folder of its own under `root`; `failures` tells of those that went wrong."""

    def __init__(self, root: Path, words: list[str], jobs: int):
        self.root, self.words, self.jobs = root, words, jobs
        self.failures: list[str] = []
        self.whole = root / "whole"
        watch, started = Watch(self.whole), time.monotonic()
        code = finish(forked(train_cross_attention, self.command(self.whole), watch, watch.report))
        if code:
            raise RuntimeError(f"The whole run ended with {code}.")
        self.seconds = time.monotonic() - started
        self.events: list[str] = json.loads(Path(f"{self.whole}.events").read_text(encoding="utf-8"))

    def command(self, folder: Path) -> list[str]:
        """The words of a run in `folder`."""
        return [*self.words, "--save_path", str(folder)]

    def go_on(self, names: list[str], folders: list[Path]) -> None:
        """Run again what was killed, and note what is not as the whole run."""
        running = [forked(train_cross_attention, self.command(folder)) for folder in folders]
        for name, folder, process in zip(names, folders, running, strict=True):
            code = finish(process)
            if code or not same(folder, self.whole):
                self.failures.append(f"{name}: {'ended with ' + str(code) if code else 'not as the whole run'}")
            elif left := [path.name for path in folder.iterdir() if path.suffix == ".tmp"]:
                self.failures.append(f"{name}: left {', '.join(left)}")

    def kill(self, deaths: dict[str, Callable[[Path], Callable[[], None]]]) -> None:
        """Kill a run in each of the ways of `deaths`, some side by side, and go on with it."""
        names = list(deaths)
        with progress(total=len(names), desc="kills", unit="kill") as bar:
            for first in range(0, len(names), self.jobs):
                wave = names[first : first + self.jobs]
                folders = [self.root / f"killed_{first + number}" for number in range(len(wave))]
                running = [
                    forked(train_cross_attention, self.command(folder), deaths[name](folder))
                    for name, folder in zip(wave, folders, strict=True)
                ]
                for process in running:
                    finish(process)
                self.go_on(wave, folders)
                bar.update(len(wave))

    def stop(self, delays: list[float], rng: random.Random) -> list[float]:
        """Send a signal to the whole group of a run with reading processes after each delay; seconds until it ended."""
        took = []
        for number, delay in enumerate(progress(delays, desc="signals", unit="signal")):
            folder, kind = self.root / f"stopped_{number}", rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
            process = forked(train_cross_attention, [*self.command(folder), "--num_workers", "2"])
            time.sleep(delay)
            started = time.monotonic()
            with contextlib.suppress(ProcessLookupError):  # it was done already
                os.killpg(process, kind)
            code = finish(process)
            took.append(time.monotonic() - started)
            name = f"{kind.name} after {delay:.2f} s"
            if code not in (0, 1, -kind):  # -kind: before anything was begun
                self.failures.append(f"{name}: ended with {code}")
            if still_there(process):
                self.failures.append(f"{name}: reading processes are left")
            self.go_on([name], [folder])
        return took


def still_there(group: int) -> bool:
    """Whether a group of processes is still there after a moment."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def at_event(number: int, half: bool) -> Callable[[Path], Callable[[], None]]:
    """A death at an event."""
    return lambda folder: Watch(folder, number, half)


def after_seconds(delay: float) -> Callable[[Path], Callable[[], None]]:
    """A death at a moment."""

    def begin() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process on the spot
        signal.setitimer(signal.ITIMER_REAL, delay)

    return lambda folder: begin


def ways_to_die(events: list[str], seconds: float, kills: int, rng: random.Random) -> dict:
    """{name: death}: half at events, the first ones and one of each kind before others; half at moments."""
    first_of_kind = {event: number for number, event in reversed(list(enumerate(events)))}
    wanted = [*range(min(10, len(events))), *first_of_kind.values(), *rng.sample(range(len(events)), len(events))]
    deaths: dict[str, Callable] = {}
    for turn in range(2):  # a second time with half a file, where the first was with a whole one
        for number in dict.fromkeys(wanted):
            half = events[number].startswith(WRITTEN) and turn == 0
            if turn == 0 or events[number].startswith(WRITTEN):
                deaths[f"event {number}, {events[number]}{', half of it' if half else ''}"] = at_event(number, half)
    chosen = dict(list(deaths.items())[: (kills + 1) // 2])
    while len(chosen) < kills:
        delay = rng.uniform(0, seconds)
        chosen[f"after {delay:.4f} s"] = after_seconds(delay)
    return chosen


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)  # what is forked can have no threads of before
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "data" / "small").mkdir(parents=True)
        small_data(root / "data")
        common = ["--dataset", "small", "--data_root", str(root / "data"), *WORDS]
        base = root / "base"
        if code := finish(forked(train, [*common, "--model_name", "demo", "--save_path", str(base)])):
            raise RuntimeError(f"The base's training ended with {code}.")
        campaign = Campaign(root, [*common, "--resume", str(base), "--loops", "2"], args.jobs)
        deaths = ways_to_die(campaign.events, campaign.seconds, args.kills, rng)
        at_events = sum(name.startswith("event") for name in deaths)
        campaign.kill(deaths)
        took = campaign.stop([rng.uniform(0, campaign.seconds) for _ in range(args.signals)], rng)
    kinds, count = len(set(campaign.events)), len(deaths) + len(took)
    print(f"{len(campaign.events)} events of {kinds} kinds; a whole run takes {campaign.seconds:.1f} s.")
    print(f"{at_events} kills at events, {len(deaths) - at_events} at moments, {len(took)} signals to the group.")
    if took:
        print(f"Ended {statistics.median(took):.2f} s after a signal, at most {max(took):.2f} s.")
    for failure in campaign.failures:
        print(f"FAILED {failure}")
    print(f"{count - len(campaign.failures)} of {count} went on to the same tensors and log.")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    run_script(main)
