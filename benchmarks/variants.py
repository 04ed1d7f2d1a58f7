"""Which part of the extension does what: every variant against its base and against the longer base, over seeds.

    python -m benchmarks.variants --name demo --recipe ckpt/demo/base.args ckpt/demo/feedback.args --dataset demo_test

Trains, per seed, a base and every variant on it (ckpt/<name>_<seed>/<variant>), tests them on the same images, and
writes results/<name>.csv (every run) and results/<name>.md (mean and standard deviation over seeds, with the command).
What is trained already is not trained again: the same command goes on where it stopped. Results hold what the command
names, so to extend them, name all seeds. The recipes' own places and machine count unless they are given here.
"""

import argparse
import csv
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from dataset.sets import result_name
from model.backbone import REPOSITORY
from utils import arguments
from utils.cli import run_script
from utils.errors import TrainingError, TrainingStoppedError
from utils.files import write_csv
from utils.logs import progress
from utils.options import at_least
from utils.signals import StopSignal
from utils.testing.metrics import IMAGE_METRICS, PIXEL_METRICS

METRICS = PIXEL_METRICS + IMAGE_METRICS
NO_MODULES = ["--no_text_cross_attn", "--no_image_cross_attn"]
CONTROL = "longer base"
SEEN = "trained_on_this_data_set"
# {variant: (arguments beside the recipe's, loops to test)}
VARIANTS = {
    CONTROL: (["--feedback", "off", *NO_MODULES], (1, 3)),
    "text cross-attention": (["--no_image_cross_attn"], (1,)),
    "image cross-attention": (["--no_text_cross_attn"], (1,)),
    "both, adapted": ([], (1, 3)),
    "both, projectors": (["--feedback", "projectors"], (3,)),
    "both, no feedback": (["--feedback", "off"], (3,)),
    "no modules, adapted": (NO_MODULES, (3,)),
}


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--name", required=True, help="of the comparison: its runs and its results are called so")
    parser.add_argument(
        "--recipe", type=Path, nargs=2, required=True, help="@FILEs for train.py and train_cross_attention.py"
    )
    parser.add_argument("--dataset", required=True, help="data set to test on")
    arguments.add_own_data_arguments(parser)
    parser.add_argument("--train_dataset", help="data set to train on; without it the recipe's")
    parser.add_argument(
        "--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="each trains a base and its variants"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which to train")
    arguments.add_run_arguments(parser)
    parser.set_defaults(data_root=None, device=None, precision=None)
    return parser.parse_args()


def call(log: Path, script: str, *words: object) -> None:
    """Run a script of the repository; what it prints goes to `log`.

    Raises TrainingError where it fails, and TrainingStoppedError, once it has saved its state, at a signal to stop.
    """
    command = [sys.executable, str(REPOSITORY / f"{script}.py"), *map(str, words)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file, StopSignal() as stop:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.2)
            if stop.received == "SIGTERM":  # Ctrl-C reaches every process of a terminal
                process.terminate()
                process.wait()
    if stop.received:
        raise TrainingStoppedError("Stopped. The same command goes on from here.")
    if process.returncode:
        raise TrainingError(f"Exit code {process.returncode}, see {log}: {shlex.join(command)}")


def run_seed(args: argparse.Namespace, seed: int, bar: tqdm) -> list[dict]:
    """Train and test one seed; a row per model tested."""
    folder = REPOSITORY / "ckpt" / f"{args.name}_{seed}"
    base, log = folder / "base", folder / "output.log"
    machine = arguments.as_words(
        arguments.given(args, "data_root", "clip_weights", "device", "num_workers", "precision")
    )
    common = ["--seed", seed, *machine]
    if args.train_dataset:
        common += ["--dataset", args.train_dataset]
    call(log, "train", f"@{args.recipe[0]}", *common, "--save_path", base)
    bar.update()
    files = {("base", 0): base / "base"}
    for name in args.variants:
        options, loops = VARIANTS[name]
        run = folder / name.replace(",", "").replace(" ", "_")
        words = ["--resume", base, "--save_path", run, "--loops", max(loops)]
        call(log, "train_cross_attention", f"@{args.recipe[1]}", *common, *words, *options)
        bar.update()
        files |= {(name, loop): run / f"loop_{loop}.pth" for loop in loops}
    ckpts = [base, *(path for (_, loop), path in files.items() if loop)]
    tested = arguments.as_words(arguments.given(args, "dataset", "domain", "class_name"))
    call(log, "test", "--ckpt", *ckpts, *tested, *machine)
    bar.update()
    return [
        {"variant": name, "loop": loop, "seed": seed}
        | read_average(path.with_name(f"{path.stem}_{result_name(args.dataset)}.csv"))
        for (name, loop), path in files.items()
    ]


def read_average(path: Path) -> dict[str, float | str]:
    """Of the average, the last row of a CSV of test.py: the metrics, NaN where undefined, and SEEN as it is."""
    with open(path, newline="", encoding="utf-8") as file:
        *_, average = csv.DictReader(file)
    return {name: float(average[name] or "nan") for name in METRICS} | {SEEN: average[SEEN]}


def spread(values: list[float], signed: bool) -> str:
    """Mean ± standard deviation, in percent; n/a where a value is undefined."""
    if any(map(math.isnan, values)):
        return "n/a"
    mean = f"{round(100 * statistics.mean(values), 2) + 0.0:{'+' if signed else ''}.2f}"  # + 0.0: never -0.00
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def table(rows: list[dict], less: Callable[[dict], dict | None] = lambda row: None) -> str:
    """Markdown: mean ± standard deviation over seeds of each metric, or of its difference from the row `less` names.

    Rows for which `less` names none of their seed are left out of a table of differences.
    """
    signed = any(less(row) for row in rows)
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for row in rows:
        other = less(row)
        if signed and other is None:
            continue
        values = {name: row[name] - (other[name] if other else 0) for name in METRICS}
        groups.setdefault((row["variant"], row["loop"]), []).append(values)
    lines = ["| | loop | " + " | ".join(name.replace("_", " ") for name in METRICS) + " |"]
    lines.append("|---" * (2 + len(METRICS)) + "|")
    for (variant, loop), runs in groups.items():
        cells = (spread([values[name] for values in runs], signed) for name in METRICS)
        lines.append(f"| {variant} | {loop} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[dict], head: str) -> str:
    """The three tables as Markdown: results, less the seed's base, less the longer base of the seed and loop."""
    known = {(row["variant"], row["loop"], row["seed"]): row for row in rows}

    def base_of(row: dict) -> dict | None:
        return known["base", 0, row["seed"]] if row["loop"] else None

    def control_of(row: dict) -> dict | None:
        return known.get((CONTROL, row["loop"], row["seed"])) if row["variant"] != CONTROL else None

    parts = [head, "Results", table(rows), "Less the base of the same seed", table(rows, base_of)]
    if any(control_of(row) for row in rows):
        parts += [f"Less the {CONTROL} of the same seed and loop", table(rows, control_of)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    args = parse_arguments()
    rows, seeds = [], list(dict.fromkeys(args.seeds))
    with progress(total=len(seeds) * (2 + len(args.variants)), desc=args.name, unit="run") as bar:
        for seed in seeds:
            rows += run_seed(args, seed, bar)
    folder = REPOSITORY / "results"
    folder.mkdir(exist_ok=True)
    write_csv(folder / f"{args.name}.csv", rows)
    trained = f"Trained on {args.train_dataset}, tested" if args.train_dataset else "Tested"
    head = (
        f"{trained} on {args.dataset}; in percent, mean ± standard deviation over seeds {', '.join(map(str, seeds))}."
    )
    if any(row[SEEN] != "False" for row in rows):
        head += " **Not zero-shot**: the models may have been trained on this data set."
    text = report(rows, f"{head}\n\n    {shlex.join(['python', '-m', 'benchmarks.variants', *sys.argv[1:]])}")
    (folder / f"{args.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
