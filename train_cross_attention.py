"""Add text and image cross-attention to a trained AA-CLIP base and train Stage 1 -> Stage 2 in N loops.

    python train_cross_attention.py --loops 3 --resume ckpt/Visa_base_full_1216

Each loop's Stage 1 looks through what the last Stage 2 learned (--feedback). Nothing is re-initialised between loops.
Writes loop_0.pth (the base) to loop_N.pth, state.pth, train.log and log.csv; the same command run again goes on where
it stopped.
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import logging
import zipfile
from collections.abc import Iterable
from pathlib import Path

from dataset.commands import name_argument, path_argument, show
from dataset.prepare import prepare
from dataset.records import digest
from dataset.sets import DataSet, open_all, result_name
from dataset.survey import surveyed
from model.config import new_extension
from utils import arguments, checkpoints, processes
from utils.checkpoints import Checkpoint, load_checkpoint
from utils.cli import run_script
from utils.machine import Machine
from utils.models import ModelLoader, resolve_config
from utils.options import at_least
from utils.report.curves import draw_training
from utils.report.tables import notes, text_table, write_results
from utils.settings import add_settings, add_training_arguments, settings_of
from utils.testing.bench import EVAL_BATCH, Batching, Bench
from utils.testing.loops import LoopTests
from utils.training.estimate import describe_estimates
from utils.training.plan import Plan, describe_plan, plan_stages
from utils.training.start import Around, start
from utils.training.trainer import Trainer

logger = logging.getLogger("train_cross_attention")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `words`."""
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--resume", type=path_argument, help="base model (AA-CLIP's folder) or loop file to start from")
    parser.add_argument(
        "--loops", type=at_least(1, 1000), default=3, help="number of the last loop of Stage 1 and Stage 2"
    )
    parser.add_argument(
        "--save_path", type=path_argument, help="folder of the run; without it ckpt/<name of the base>_feedback"
    )
    parser.add_argument(
        "--eval_dataset",
        type=name_argument,
        nargs="+",
        default=[],
        help="data sets to test every loop on, beside the base, as test.py does; nothing is chosen by it",
    )
    add_settings(parser)
    add_training_arguments(parser)
    arguments.add_model_arguments(
        parser,
        "the checkpoint's value, else AA-CLIP's, in brackets",
        extension="the loop file's value; on a base both are on, with the values in brackets",
    )
    arguments.add_run_arguments(parser)
    return parser.parse_args(words)


def make_plan(args: argparse.Namespace, checkpoint: Checkpoint | None) -> Plan:
    """What the run will do. Raises ValueError or FileNotFoundError for arguments that do not go together."""
    settings = settings_of(args)
    loops = range(checkpoint.loop + 1 if checkpoint else 1, args.loops + 1)
    files = [*(f"loop_{loop}.pth" for loop in (0, *loops)), "state.pth", "train.log", "log.csv", "training.png"]
    files += [f"loop_<k>_{result_name(name)}.csv, _images.csv" for name in args.eval_dataset]
    files += ["tensorboard/"] if args.tensorboard else []
    config = resolve_config(arguments.model_flags(args), checkpoint, new_extension(args.cross_attn))
    base = start_of(checkpoint) if checkpoint else {}
    return Plan(config, settings, plan_stages(settings, loops), run_folder(args), files, base)


def run_folder(args: argparse.Namespace) -> Path:
    """Folder of the run, never that of the checkpoint it starts from."""
    if args.resume is None:
        return args.save_path or Path("ckpt") / "<base>_feedback"
    source = args.resume if args.resume.is_dir() else args.resume.parent
    folder = args.save_path or Path("ckpt") / f"{source.resolve().name}_feedback"
    if folder.resolve() == source.resolve():
        raise ValueError(f"--save_path {folder}: holds the checkpoint of --resume. Choose another folder.")
    return folder


def load_start(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint of --resume. Raises ValueError or FileNotFoundError where a run cannot go on from it as asked."""
    if args.resume is None:
        if args.dry_run:
            return None
        raise ValueError(
            "--resume is needed, also to go on: the folder of a base model (train.py makes one) or a loop file."
        )
    checkpoint = load_checkpoint(args.resume)
    if checkpoint.is_loop_file:
        if args.loops <= checkpoint.loop:
            raise ValueError(f"--loops {args.loops}: {args.resume} is loop {checkpoint.loop} already; ask for more.")
        if args.optimizer_state == "carry":
            raise ValueError("--optimizer_state carry: loop files hold no optimiser. Extend the run in its own folder.")
        load_checkpoint(checkpoint.folder / "loop_0.pth")  # the base, which belongs beside it
    return checkpoint


def start_of(checkpoint: Checkpoint) -> dict:
    """What the run starts from: the base, and the loop file where it goes on from one."""
    if not checkpoint.is_loop_file:
        return checkpoint.base
    continued = {"path": checkpoint.path.as_posix(), "sha256": checkpoints.file_sha256(checkpoint.path)}
    return checkpoint.base | {"continued_from": continued, "datasets": checkpoint.seen()}


def open_eval_sets(names: list[str], machine: Machine) -> list[DataSet]:
    """The data sets of --eval_dataset, their files checked, so that a bad one is found before training."""
    with processes.first_ahead():
        for name in names:
            prepare(name, machine.data_root, machine.follow_links)
        links, skip = machine.follow_links, machine.skip_broken
        data_sets = open_all(names, machine.data_root, follow_links=links, skip_broken=skip)
    return processes.once_here(lambda: [surveyed(data, None, skip) for data in data_sets])


def is_whole(path: Path) -> bool:
    """Whether a checkpoint file is there, to its end."""
    return path.is_file() and zipfile.is_zipfile(path)


def keep_base(trainer: Trainer, source: Checkpoint) -> None:
    """Write loop_0.pth, the base that the run is compared with, unless it is there and whole."""
    path = trainer.folder / "loop_0.pth"
    if processes.from_first(lambda: is_whole(path)):
        return
    if not source.is_loop_file:
        save_loop(trainer, 0)
    elif processes.is_first():
        checkpoints.save(checkpoints.read(source.folder / "loop_0.pth"), path)


def save_loop(trainer: Trainer, loop: int) -> Path:
    """Write loop_<loop>.pth: the four modules as they are, and all that tells how they came to be."""
    path = trainer.folder / f"loop_{loop}.pth"
    calibration = trainer.calibrate()
    if not processes.is_first():
        return path
    content = {
        **checkpoints.states(trainer.model),
        **trainer.plan.header,
        "loop": loop,
        "metrics": trainer.log.metrics,
        "calibration": calibration,
        "environment": checkpoints.environment(trainer.model.backbone, trainer.device),
    }
    checkpoints.save(content, path)
    logger.info("Saved %s", path)
    return path


def report_lost(folder: Path, loops: Iterable[int]) -> None:
    """Say which files of finished loops are gone or damaged: the run is past them, and does not write them again."""
    for path in (folder / f"loop_{loop}.pth" for loop in dict.fromkeys(loops)):
        if not is_whole(path):
            logger.warning(
                "%s is %s, and the run is past it. To have it again, repeat the run in another --save_path: the same "
                "command gives the same tensors.",
                path,
                "damaged" if path.is_file() else "missing",
            )


def report_tests(trainer: Trainer, tests: LoopTests, path: Path) -> None:
    """Test a loop that was saved beside the base, write both results, and log the rows of the average."""
    processes.wait()  # until it is saved
    for comparison in tests.test(path, after_batch=trainer.stop.check):
        for results in comparison.results:
            write_results(results)
        table = text_table(comparison, average_only=True)
        logger.info("\n".join([f"{comparison.data.name}, in percent", table, *notes(comparison)]))


def main() -> None:
    args = parse_arguments()
    checkpoint = load_start(args)
    plan = make_plan(args, checkpoint)
    if checkpoint is None or args.dry_run:
        how = args.device_tflops, args.grad_checkpointing, args.accumulate
        show(describe_plan(plan), "", describe_estimates(plan, *how))
        return
    machine = arguments.machine_of(args)
    trainer = start(plan, checkpoint, machine, Around.of(args))
    if trainer is None:
        report_lost(plan.folder, [0, *(stage.loop for stage in plan.stages)])
        return
    report_lost(plan.folder, range(plan.stages[0].loop, trainer.past + 1))
    backbone = trainer.model.backbone
    how = plan.settings.precision, plan.settings.reduced_jpeg, machine.resized_images
    batching = Batching(EVAL_BATCH, machine.num_workers, *how)
    data_sets = open_eval_sets(args.eval_dataset, machine)
    arguments.check_same(args, lambda: {f"images of {data.name}": digest(data.records) for data in data_sets})
    benches = [Bench(data, backbone, batching) for data in data_sets]
    tests = LoopTests(benches, ModelLoader(machine.device, backbone=backbone))
    with trainer.running():
        keep_base(trainer, checkpoint)
        for stage in trainer.stages():
            if stage.name == "image":  # a loop ends with Stage 2
                path = save_loop(trainer, stage.loop)
                if processes.is_first():
                    draw_training(trainer.folder / "log.csv", trainer.folder / "training.png")
                report_tests(trainer, tests, path)
    last = trainer.folder / f"loop_{plan.last_loop}.pth"
    logger.info("Done. Compare with the base: python test.py --ckpt %s --dataset NAME", last)


if __name__ == "__main__":
    run_script(main)
