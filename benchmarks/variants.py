"""Which part of the extension does what: variants against their base and against the longer base, over seeds.

    python -m benchmarks.variants --name demo --base_recipe ckpt/demo/base.args --recipe ckpt/demo/feedback.args \\
        --dataset demo_dev

    python -m benchmarks.variants --name visa --resume ckpt/Visa_base_full_1216 --dataset MVTec BTAD MPDD

Starts from the base of --resume, or trains one per seed. Trains every variant (ckpt/<name>_<seed>/<variant>), tests all
on the same images, and writes results/<name>.csv (every run), .md (tables, with the command) and .png. First it says
how long that will take. What is trained already is not trained again: the same command goes on where it stopped.
"""

from utils.threads import WAIT_POLICY

import argparse
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

import train
import train_cross_attention
from benchmarks.speed import cases, measure
from benchmarks.standin import standin_backbone
from dataset.commands import path_argument
from dataset.prepare import prepare
from dataset.sets import open_all, open_dataset, result_name
from model.config import REPOSITORY, ModelConfig, model_fields
from utils import arguments, checkpoints
from utils.checkpoints import load_checkpoint
from utils.cli import run_script
from utils.errors import TrainingError, TrainingStoppedError
from utils.files import read_csv, write_csv
from utils.logs import progress
from utils.options import at_least
from utils.report.plots import save_figure
from utils.report.tables import percent
from utils.signals import StopSignal
from utils.testing.metrics import IMAGE_METRICS, PIXEL_METRICS
from utils.training.plan import Stage

METRICS = PIXEL_METRICS + IMAGE_METRICS + ("decision_accuracy",)
# What the figure and the verdict speak of.
HEADLINE = ("pixel_ap", "image_auroc")
NO_MODULES = ["--no_text_cross_attn", "--no_image_cross_attn"]
CONTROL, DEFAULT, UNTRAINED = "longer base", "joint", "untrained"
SEEN = "trained_on_this_data_set"
# {variant: (arguments beside the recipe's, loops to test)}
VARIANTS = {
    CONTROL: (["--feedback", "off", *NO_MODULES], (1, 3)),
    DEFAULT: ([], (1, 3)),
    "joint, text alone": (["--no_image_cross_attn"], (3,)),
    "joint, image alone": (["--no_text_cross_attn"], (3,)),
    "joint, no feedback": (["--feedback", "off"], (3,)),
    "feedback alone": (NO_MODULES, (3,)),
    "block": (["--cross_attn", "block"], (3,)),
}


class Given(NamedTuple):
    """A loop of a variant, changed without training: cross-attentions of open gates, or ones that see another image."""

    variant: str
    loop: int
    untrained: bool
    image_context: str = "adapted"


# What the cross-attention is worth without training, and what of it is left where it sees another image.
GIVEN = {
    f"base, {UNTRAINED} joint": Given(CONTROL, 0, True),
    f"{CONTROL}, {UNTRAINED} joint": Given(CONTROL, 3, True),
    f"{CONTROL}, {UNTRAINED} joint, another image": Given(CONTROL, 3, True, "another"),
    f"{DEFAULT}, another image": Given(DEFAULT, 3, False, "another"),
}


class Job(NamedTuple):
    """A script to run with its arguments; what it prints goes to `log`."""

    log: Path
    script: str
    words: list[str]


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--name", required=True, help="of the comparison: its runs and its results are called so")
    parser.add_argument("--resume", type=path_argument, help="base of all runs; without it each seed trains its own")
    parser.add_argument("--base_recipe", type=path_argument, help="@FILE of train.py, where bases are trained")
    parser.add_argument("--recipe", type=path_argument, help="@FILE of train_cross_attention.py")
    parser.add_argument("--dataset", nargs="+", required=True, help="data sets to test on")
    arguments.add_own_data_arguments(parser)
    parser.add_argument("--train_dataset", help="data set to train on; without it the recipe's, or the default")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2, 3, 4], help="of the runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which to train")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes side by side, which share the CPU cores")
    arguments.add_run_arguments(parser)
    parser.set_defaults(data_root=None, device=None, precision=None)
    args = parser.parse_args()
    if args.resume and args.base_recipe:
        parser.error("--resume names the base, and --base_recipe would train one: give one of them.")
    args.variants = list(dict.fromkeys([CONTROL, *args.variants]))
    return args


# running


def run_all(jobs: list[Job], side_by_side: int, bar: tqdm) -> None:
    """Run scripts of the repository, several at a time.

    Raises TrainingError where one fails, and TrainingStoppedError at a signal, once all have ended: with their state
    saved, or on Windows, where they are ended at once, with the state of their last save.
    """
    waiting, running = deque(jobs), dict[subprocess.Popen, Job]()
    with StopSignal() as stop:
        try:
            while (waiting or running) and not stop.received:
                while waiting and len(running) < side_by_side:
                    job = waiting.popleft()
                    running[_begin(job, side_by_side)] = job
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    if process.returncode:
                        command = shlex.join([job.script, *job.words])
                        raise TrainingError(f"Exit code {process.returncode}, see {job.log}: {command}")
                    bar.update()
                time.sleep(0.2)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if stop.received:
        raise TrainingStoppedError("Stopped. The same command goes on from here.")


def _begin(job: Job, side_by_side: int) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / f"{job.script}.py"), *job.words]
    # Threads that wait for each other by spinning hold up whatever else runs.
    share = max(1, (os.cpu_count() or 1) // side_by_side)
    threads = {"OMP_NUM_THREADS": str(share), WAIT_POLICY: "PASSIVE"} if side_by_side > 1 else {}
    with open(job.log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)


def folder_of(args: argparse.Namespace, seed: int) -> Path:
    """Where the runs of a seed are."""
    return REPOSITORY / "ckpt" / f"{args.name}_{seed}"


def run_folder(args: argparse.Namespace, seed: int, variant: str) -> Path:
    """Where a variant of a seed is."""
    return folder_of(args, seed) / variant.replace(",", "").replace(" ", "_")


def machine_words(args: argparse.Namespace) -> list[str]:
    """What the scripts are told of the machine."""
    names = ("data_root", "clip_weights", "device", "num_workers", "precision", "resized_images")
    return [*arguments.as_words(arguments.given(args, *names)), *(["--tf32"] if args.tf32 else [])]


def common_words(args: argparse.Namespace, recipe: Path | None, seed: int) -> list[str]:
    """What both trainings are told."""
    words = [f"@{recipe}"] if recipe else []
    words += ["--dataset", args.train_dataset] if args.train_dataset else []
    return [*words, "--seed", str(seed), *machine_words(args)]


def base_of(args: argparse.Namespace, seed: int) -> Path:
    """The base that a seed starts from."""
    return args.resume or folder_of(args, seed) / "base"


def base_job(args: argparse.Namespace, seed: int) -> Job:
    """Trains the base of a seed."""
    words = common_words(args, args.base_recipe, seed)
    return Job(folder_of(args, seed) / "base.log", "train", [*words, "--save_path", str(base_of(args, seed))])


def variant_job(args: argparse.Namespace, seed: int, variant: str) -> Job:
    """Trains a variant of a seed."""
    options, loops = VARIANTS[variant]
    folder = run_folder(args, seed, variant)
    words = [*common_words(args, args.recipe, seed), "--resume", str(base_of(args, seed)), "--save_path", str(folder)]
    return Job(folder.with_suffix(".log"), "train_cross_attention", [*words, "--loops", str(max(loops)), *options])


def tested_files(args: argparse.Namespace, seed: int) -> dict[tuple[str, int], Path]:
    """{(variant, loop): loop file} of all that is tested of a seed; the base is the longer base's loop_0.pth.

    What is made of the base without training counts as loop 0, though its file cannot be called so.
    """
    longer = run_folder(args, seed, CONTROL)
    files = {("base", 0): longer / "loop_0.pth"}
    for variant in args.variants:
        for loop in VARIANTS[variant][1]:
            files[variant, loop] = run_folder(args, seed, variant) / f"loop_{loop}.pth"
    for name, given in given_of(args).items():
        files[name, given.loop] = run_folder(args, seed, name) / f"loop_{max(given.loop, 1)}.pth"
    return files


def given_of(args: argparse.Namespace) -> dict[str, Given]:
    """Those of GIVEN whose variant is trained."""
    return {name: given for name, given in GIVEN.items() if given.variant in args.variants}


def extension_of(args: argparse.Namespace, seed: int) -> dict:
    """The fields of the model's extension as the default variant has them, whether it is trained or not."""
    run = train_cross_attention.parse_arguments(variant_job(args, seed, DEFAULT).words)
    config = train_cross_attention.make_plan(run, load_checkpoint(base_of(args, seed))).config
    return {field.name: getattr(config, field.name) for field in model_fields(extension=True)}


def write_given(args: argparse.Namespace, seed: int) -> None:
    """Write the models of `given_of` as loops of runs of their own."""
    extension = extension_of(args, seed)
    for name, given in given_of(args).items():
        source, folder = run_folder(args, seed, given.variant), run_folder(args, seed, name)
        content = checkpoints.read(source / f"loop_{given.loop}.pth")
        model = content["config"]["model"]
        if given.untrained:
            model |= extension
            levels = sum(key.startswith("seg_proj") for key in content["image_adapter"])
            for module in ("text_cross_attn", "image_cross_attn"):
                content[module] = {"gate": torch.full((levels,), model[f"{module}_weight"])}
        model["image_context"] = given.image_context
        # Another map than the calibration was fitted on; and loop 0 would be the base itself.
        content |= {"calibration": None, "loop": max(given.loop, 1)}
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save(checkpoints.read(source / "loop_0.pth"), folder / "loop_0.pth")
        checkpoints.save(content, folder / f"loop_{content['loop']}.pth")


def test_job(args: argparse.Namespace, seed: int) -> Job:
    """Tests all models of a seed, side by side with the longer base."""
    files = [str(path) for path in tested_files(args, seed).values()]
    words = ["--ckpt", *files, "--control", str(run_folder(args, seed, CONTROL)), "--dataset", *args.dataset]
    words += arguments.as_words(arguments.given(args, "domain", "class_name"))
    return Job(folder_of(args, seed) / "test.log", "test", [*words, *machine_words(args)])


def read_results(args: argparse.Namespace, seed: int) -> list[dict]:
    """A row per model and data set: metrics, and the intervals over images of differences from the longer base."""
    rows = []
    intervals = [f"{name}_less_control_{end}" for name in METRICS for end in ("low", "high")]
    for dataset in args.dataset:
        for (variant, loop), path in tested_files(args, seed).items():
            head = {"dataset": result_name(dataset), "variant": variant, "loop": loop, "seed": seed}
            compared = intervals if variant != CONTROL and loop > 0 else []
            average = read_average(path.with_name(f"{path.stem}_{result_name(dataset)}.csv"), [*METRICS, *compared])
            rows.append(head | dict.fromkeys([*METRICS, *intervals], math.nan) | average)
    return rows


def read_average(path: Path, columns: Sequence[str]) -> dict[str, float | str]:
    """Of the average, the last row of a CSV of test.py: `columns`, NaN where undefined, and SEEN as it is.

    Raises ValueError where one of them is not there.
    """
    average = read_csv(path, [*columns, SEEN])[-1]
    return {name: float(average[name] or "nan") for name in columns} | {SEEN: average[SEEN]}


# how long it takes


def estimate(args: argparse.Namespace) -> float:
    """Hours that all trainings and tests will take, from a few steps measured now on stand-in weights."""
    loops = max(loop for variant in args.variants for loop in VARIANTS[variant][1])
    words = [*common_words(args, args.recipe, 0), "--loops", str(loops)]
    run = train_cross_attention.parse_arguments(words)
    if args.resume:
        plan = train_cross_attention.make_plan(run, load_checkpoint(args.resume))
        base_stages, config = [], plan.config
    else:
        base = train.make_plan(train.parse_arguments(common_words(args, args.base_recipe, 0)))
        plan = train_cross_attention.make_plan(run, None)
        base_stages, config = base.stages, base.config
    machine = arguments.machine_of(run)
    seconds = seconds_of_steps(config, machine.device, plan.settings.precision)
    prepare(plan.settings.dataset, machine.data_root)
    count = len(open_dataset(plan.settings.dataset, machine.data_root).records)

    def trained(stages: list[Stage]) -> float:
        return sum(stage.epochs * count * seconds[step_of(stage)] for stage in stages)

    for name in args.dataset:
        prepare(name, machine.data_root)
    named = {"domain": args.domain, "class_name": args.class_name}
    tested = sum(len(data.records) for data in open_all(args.dataset, machine.data_root, **named))
    tests = tested * len(tested_files(args, 0)) * seconds["evaluation, both cross-attentions"]
    return len(args.seeds) * (trained(base_stages) + len(args.variants) * trained(plan.stages) + tests) / 3600


def step_of(stage: Stage) -> str:
    """A step of a stage as `benchmarks.speed` names it."""
    if stage.name == "image":
        return "Stage 2 step"
    return "Stage 1 step, loop 1" if stage.loop == 1 else "Stage 1 step, later loops"


def seconds_of_steps(config: ModelConfig, device: torch.device, precision: str) -> dict[str, float]:
    """{what `benchmarks.speed` measures: seconds per image}, of the second call of each."""
    backbone, batch = standin_backbone(config.model_name, config.img_size).to(device), 2
    seconds = {}
    for name, step in cases(backbone, batch, DEFAULT, precision).items():
        step()
        taken, _ = measure(step, device)
        seconds[name] = taken / batch
    return seconds


# tables


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval by Student's t; NaN where a value is, or of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2 or math.isnan(mean):
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, in percent; n/a where a value is undefined."""
    mean = statistics.fmean(values)
    if len(values) < 2 or math.isnan(mean):
        return percent(mean)
    return f"{percent(mean)} ± {percent(statistics.stdev(values))}"


def with_ends(mean: float, low: float, high: float) -> str:
    """A difference with the ends of its interval, in percent; a star where these leave out 0."""
    shown = percent(mean, signed=True)
    if math.isnan(low):
        return shown
    return f"{shown}{'*' if low > 0 or high < 0 else ''} {ends(low, high)}"


def ends(low: float, high: float) -> str:
    """The ends of an interval, in percent."""
    return f"[{percent(low, signed=True)}, {percent(high, signed=True)}]"


def grouped(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """{(variant, loop): its rows over seeds}."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["loop"]), []).append(row)
    return groups


def table(cells: dict[tuple[str, int], list[str]]) -> str:
    """Markdown of one cell per metric."""
    lines = ["| | loop | " + " | ".join(name.replace("_", " ") for name in METRICS) + " |"]
    lines.append("|---" * (2 + len(METRICS)) + "|")
    lines += [f"| {variant} | {loop} | " + " | ".join(row) + " |" for (variant, loop), row in cells.items()]
    return "\n".join(lines)


def differences(rows: list[dict], less: Callable[[dict], dict | None]) -> dict[tuple[str, int], dict[str, list[float]]]:
    """{(variant, loop): {metric: differences over seeds}} from the row that `less` names, where it names one."""
    found = {}
    for key, runs in grouped(rows).items():
        pairs = [(row, other) for row in runs if (other := less(row)) is not None]
        if pairs:
            found[key] = {name: [row[name] - other[name] for row, other in pairs] for name in METRICS}
    return found


def references(rows: list[dict]) -> tuple[Callable[[dict], dict | None], Callable[[dict], dict | None]]:
    """What a row is compared with: the base of its seed, and the longer base of its seed and loop."""
    known = {(row["variant"], row["loop"], row["seed"]): row for row in rows}

    def base(row: dict) -> dict | None:
        return known["base", 0, row["seed"]] if row["variant"] != "base" else None

    def control(row: dict) -> dict | None:
        return known.get((CONTROL, row["loop"], row["seed"])) if row["variant"] != CONTROL else None

    return base, control


def verdict(rows: list[dict]) -> str:
    """What the default does, against equally long training without it, in a sentence."""
    _, control = references(rows)
    found = differences(rows, control)
    keys = [key for key in found if key[0] == DEFAULT]
    if not keys:
        return ""
    variant, loop = max(keys, key=lambda key: key[1])
    parts, words = [], []
    for name in HEADLINE:
        mean, low, high = interval(found[variant, loop][name])
        parts.append(f"{name.replace('_', ' ')} by {with_ends(mean, low, high)}")
        words.append("up" if low > 0 else "down" if high < 0 else "not more than seeds differ")
    count = len(found[variant, loop][HEADLINE[0]])
    changed = (
        f"After {loop} loops, cross-attention with feedback changes {' and '.join(parts)} points against {CONTROL}"
    )
    return f"{changed} ({count} seeds): {', '.join(words)}."


def report(rows: list[dict], dataset: str) -> str:
    """The tables of one data set as Markdown."""
    rows = [row for row in rows if row["dataset"] == dataset]
    base, control = references(rows)
    seen = any(row[SEEN] != "False" for row in rows)
    parts = [f"## {dataset}", "**Not zero-shot**: the models may have been trained on this data set." if seen else ""]
    parts += [verdict(rows), "Mean ± standard deviation over seeds, in percent"]
    parts.append(table({key: [spread([r[n] for r in runs]) for n in METRICS] for key, runs in grouped(rows).items()}))
    for title, less in (("the base of the same seed", base), (f"the {CONTROL} of the same seed and loop", control)):
        found = differences(rows, less)
        cells = {key: [with_ends(*interval(values[name])) for name in METRICS] for key, values in found.items()}
        parts += [f"Less {title}: mean and 95 % interval over seeds (t, paired)", table(cells)]
    cells = {
        key: [_over_images(runs, name) for name in METRICS]
        for key, runs in grouped([row for row in rows if control(row)]).items()
    }
    parts += [
        f"Less the {CONTROL}: 95 % interval over the images of the test, mean over seeds of its ends",
        table(cells),
    ]
    return "\n\n".join(part for part in parts if part)


def _over_images(runs: list[dict], name: str) -> str:
    low, high = (statistics.mean(row[f"{name}_less_control_{end}"] for row in runs) for end in ("low", "high"))
    return "n/a" if math.isnan(low) else ends(low, high)


def draw(rows: list[dict], path: Path) -> None:
    """Differences from the longer base: every seed a dot, the mean with its interval over seeds, per data set."""
    data_sets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure(figsize=(9, 1 + 2.6 * len(data_sets)), layout="constrained")
    axes = figure.subplots(len(data_sets), len(HEADLINE), squeeze=False, sharey=True)
    for line, dataset in zip(axes, data_sets, strict=True):
        chosen = [row for row in rows if row["dataset"] == dataset]
        found = differences(chosen, references(chosen)[1])
        for axis, name in zip(line, HEADLINE, strict=True):
            for place, values in enumerate(found.values()):
                mean, low, high = (100 * value for value in interval(values[name]))
                axis.plot([100 * value for value in values[name]], [place] * len(values[name]), ".", color="#999999")
                axis.plot([low, high], [place, place], color="#0072B2", linewidth=2)
                axis.plot([mean], [place], "o", color="#0072B2", markersize=5)
            axis.axvline(0, color="#222222", linewidth=0.8)
            axis.set_yticks(range(len(found)), [f"{variant}, loop {loop}" for variant, loop in found], fontsize=7)
            axis.set_title(f"{dataset}: {name.replace('_', ' ')}, points", fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
        line[0].invert_yaxis()
    figure.suptitle(f"Less the {CONTROL}: mean and 95 % interval over seeds", fontsize=9)
    save_figure(figure, path)


def main() -> None:
    args = parse_arguments()
    seeds = list(dict.fromkeys(args.seeds))
    hours = estimate(args)
    print(f"All of it takes about {hours:.1f} hours in one process here; less where something is trained already.")
    bases = [base_job(args, seed) for seed in seeds] if args.resume is None else []
    trainings = [variant_job(args, seed, variant) for seed in seeds for variant in args.variants]
    with progress(total=len(bases) + len(trainings) + len(seeds), desc=args.name, unit="run") as bar:
        run_all(bases, args.jobs, bar)
        run_all(trainings, args.jobs, bar)
        for seed in seeds:
            write_given(args, seed)
        run_all([test_job(args, seed) for seed in seeds], args.jobs, bar)
    rows = [row for seed in seeds for row in read_results(args, seed)]
    folder = REPOSITORY / "results"
    folder.mkdir(exist_ok=True)
    write_csv(folder / f"{args.name}.csv", rows)
    draw(rows, folder / f"{args.name}.png")
    command = shlex.join(["python", "-m", "benchmarks.variants", *sys.argv[1:]])
    names = dict.fromkeys(row["dataset"] for row in rows)
    text = "\n\n".join([f"# {args.name}", f"    {command}", f"![]({args.name}.png)", *(report(rows, n) for n in names)])
    (folder / f"{args.name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
