"""What the traps of the published code cost: bases that are trained with one thing changed, less the published way.

    python -m benchmarks.traps --name demo_traps --base_recipe ckpt/demo/base.args --dataset demo_dev

Trains the bases of every seed (ckpt/<name>_<seed>/), tests them, and writes results/<name>.csv (every base) and .md
(the table, with the command). What is trained already is not trained again.
"""

import argparse
import shlex
import sys
from pathlib import Path

from benchmarks.variants import Job, common_words, folder_of, interval, machine_words, read_average, run_all, with_ends
from dataset.commands import path_argument
from dataset.sets import result_name
from model.config import REPOSITORY
from utils import arguments
from utils.cli import run_script
from utils.files import write_csv
from utils.logs import progress
from utils.options import at_least
from utils.report.tables import percent

PUBLISHED = "as published"
# {what is changed: flags of train.py}
TRAPS = {
    PUBLISHED: [],
    "V-V attention within the image": ["--vv_attention", "image"],
    "Stage 1 on all four levels": ["--stage1_levels", "all"],
    "detection loss at temperature 10": ["--det_temperature", "10"],
    "detection loss at temperature 50": ["--det_temperature", "50"],
    "the activation that CLIP was not trained with": ["--quick_gelu"],
}
SHOWN = ("pixel_auroc", "pixel_ap", "pixel_aupro", "image_auroc", "single_auroc")


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--name", required=True, help="of the comparison: its bases and its results are called so")
    parser.add_argument("--base_recipe", type=path_argument, help="@FILE of train.py")
    parser.add_argument("--dataset", required=True, help="data set to test on")
    parser.add_argument("--train_dataset", help="data set to train on; without it the recipe's, or the default")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="of the bases")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes side by side; on a CPU one core each")
    arguments.add_run_arguments(parser)
    parser.set_defaults(data_root=None, device=None, precision=None)
    return parser.parse_args()


def base_folder(args: argparse.Namespace, seed: int, trap: str) -> Path:
    """Where the base of a seed is that was trained with one thing changed."""
    return folder_of(args, seed) / trap.replace(" ", "_")


def train_job(args: argparse.Namespace, seed: int, trap: str) -> Job:
    """Trains one."""
    folder = base_folder(args, seed, trap)
    words = [*common_words(args, args.base_recipe, seed), "--save_path", str(folder), *TRAPS[trap]]
    return Job(folder.with_suffix(".log"), "train", words)


def test_job(args: argparse.Namespace, seed: int, trap: str) -> Job:
    """Tests one: those of another activation stand on another backbone, so each has a test of its own."""
    folder = base_folder(args, seed, trap)
    words = ["--ckpt", str(folder), "--dataset", args.dataset, *machine_words(args)]
    return Job(folder.with_suffix(".log"), "test", words)


def read_results(args: argparse.Namespace, seed: int) -> list[dict]:
    """A row per base of a seed."""
    rows = []
    for trap in TRAPS:
        average = read_average(base_folder(args, seed, trap) / f"base_{result_name(args.dataset)}.csv", SHOWN)
        rows.append({"dataset": result_name(args.dataset), "changed": trap, "seed": seed} | average)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: the published way, and every change less it, over seeds."""
    of = {trap: [row for row in rows if row["changed"] == trap] for trap in TRAPS}
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |", "|---" * (1 + len(SHOWN)) + "|"]
    for trap, chosen in of.items():
        cells = []
        for name in SHOWN:
            mean, low, high = interval(
                [row[name] - other[name] for row, other in zip(chosen, of[PUBLISHED], strict=True)]
            )
            cells.append(with_ends(mean, low, high))
        if trap == PUBLISHED:
            cells = [percent(sum(row[name] for row in chosen) / len(chosen)) for name in SHOWN]
        lines.append(f"| {trap} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    args.seeds = list(dict.fromkeys(args.seeds))
    pairs = [(seed, trap) for seed in args.seeds for trap in TRAPS]
    with progress(total=2 * len(pairs), desc=args.name, unit="run") as bar:
        run_all([train_job(args, *pair) for pair in pairs], args.jobs, bar)
        run_all([test_job(args, *pair) for pair in pairs], args.jobs, bar)
    rows = [row for seed in args.seeds for row in read_results(args, seed)]
    folder = REPOSITORY / "results"
    folder.mkdir(exist_ok=True)
    write_csv(folder / f"{args.name}.csv", rows)
    command = shlex.join(["python", "-m", "benchmarks.traps", *sys.argv[1:]])
    said = "In percent; below it what is gained or lost by the change: mean and 95 % interval over seeds (t, paired)"
    text = f"# {args.name}\n\n    {command}\n\n{said}\n\n{table(rows)}\n"
    (folder / f"{args.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
