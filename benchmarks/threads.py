"""Seconds of a short training on the demo, alone and beside other programs, by how its threads wait for each other.

    python -m benchmarks.threads

The ways: as the scripts choose (utils/threads.py), PyTorch's own, sleeping, and one thread. Beside each time stands its
ratio to what would be fair: alone, the best of the ways; beside programs that are as many as the other processors, one
thread's time; beside more, that of one thread with its part of all processors. Medians over the repeats, in which the
ways take turns. Nothing else may run meanwhile.
"""

from utils.threads import DECIDED, WAIT_POLICY

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from model.config import REPOSITORY

# What each way sets. The second is libgomp's own number, which `utils.threads` takes for the user's wish.
WAYS = {
    "as chosen": {},
    "PyTorch's own": {"GOMP_SPINCOUNT": "300000"},
    "sleeping": {WAIT_POLICY: "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
TRAINING = ["train_cross_attention.py", "--resume", "ckpt/demo/base", "--dataset", "demo_train", "--loops", "1"]
TRAINING += ["--shot", "4", "--text_epoch", "1", "--image_epoch", "1", "--device", "cpu"]


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many programs run that do nothing but compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(way: dict[str, str]) -> float:
    """Of one training from its start to its end."""
    unset = ("OMP_NUM_THREADS", *DECIDED)
    environment = {name: value for name, value in os.environ.items() if name not in unset} | way
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *TRAINING, "--save_path", f"{folder}/run"]
        started = time.perf_counter()
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
        return time.perf_counter() - started


def fair(programs: int, alone: dict[str, float], beside: dict[str, float], processors: int) -> float:
    """What a time is compared with; `alone` and `beside`: {way: seconds}."""
    if programs == 0:
        return min(alone.values())
    if programs < processors:
        return beside["one thread"]
    return alone["one thread"] * (programs + 1) / processors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--programs", type=int, nargs="+", default=[0, 1, 3], help="that run beside it")
    args = parser.parse_args()
    times: dict[int, dict[str, list[float]]] = {count: {way: [] for way in WAYS} for count in args.programs}
    seconds(WAYS["sleeping"])  # renders the data, and brings the files into memory
    rounds = [(count, way) for _ in range(args.repeats) for count in args.programs for way in WAYS]
    for count, way in tqdm(rounds, unit="training"):
        with busy(count):
            times[count][way].append(seconds(WAYS[way]))
    medians = {count: {way: statistics.median(found) for way, found in of.items()} for count, of in times.items()}
    processors = os.cpu_count() or 1
    print(f"{processors} processors, medians of {args.repeats}\n{'beside':10}" + "".join(f"{way:>24}" for way in WAYS))
    for count, of in medians.items():
        basis = fair(count, medians[0], of, processors)
        cells = "".join(f"{of[way]:13.1f} s ({of[way] / basis:4.2f} x)" for way in WAYS)
        print(f"{count} programs" + cells)


if __name__ == "__main__":
    main()
