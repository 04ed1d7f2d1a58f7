"""Add text and image cross-attention to a trained AA-CLIP base and train Stage 1 -> Stage 2 in N loops.

    python train_cross_attention.py --loops 3 --resume ckpt/Visa_base_full_1216

Each loop's Stage 1 looks through what the last Stage 2 learned (--feedback). Nothing is re-initialised between loops.
Writes loop_0.pth (the base) to loop_N.pth, state.pth, train.log and log.csv; the same command run again goes on where
it stopped.
"""

import argparse
import logging
from pathlib import Path

import torch

from dataset.images import check_files
from dataset.sets import DataSet, canonical_name, open_all
from forward_utils_cross_attention import FEEDBACK, PromptBank, check_grid
from model.adapter_cross_attention import CrossAttentionCLIP
from utils import arguments, checkpoints, tables
from utils.bootstrap import RESAMPLES
from utils.checkpoints import Checkpoint, load_checkpoint
from utils.cli import run_script
from utils.engine import Trainer
from utils.evaluation import Batching, evaluate, load_models
from utils.plan import Run, Stage, plan_stages
from utils.plots import draw_training
from utils.start import start

logger = logging.getLogger("train_cross_attention")

# Images per forward of --eval_dataset; results do not depend on it.
EVAL_BATCH = 8


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--resume", type=Path, help="base model (AA-CLIP's folder) or loop file to start from")
    parser.add_argument(
        "--loops", type=arguments.at_least(1), default=3, help="number of the last loop of Stage 1 and Stage 2"
    )
    parser.add_argument("--save_path", type=Path, help="folder of the run; without it ckpt/<name of the base>_feedback")
    group = parser.add_argument_group("cross-attention")
    off = {"action": "store_false", "default": None}
    group.add_argument("--no_text_cross_attn", dest="text_cross_attn", help="without text -> image", **off)
    group.add_argument("--no_image_cross_attn", dest="image_cross_attn", help="without image -> text", **off)
    group.add_argument("--text_cross_attn_weight", type=arguments.finite, help="weight of its added term [0.1]")
    group.add_argument("--image_cross_attn_weight", type=arguments.finite, help="weight of its added term [0.1]")
    group.add_argument("--text_cross_attn_lr", type=arguments.positive, help="learning rate; without it Stage 1's")
    group.add_argument("--image_cross_attn_lr", type=arguments.positive, help="learning rate; without it Stage 2's")
    group.add_argument(
        "--image_context",
        choices=("adapted", "frozen"),
        help="what the prompts see: V1 and CLS of the model's own forward, or of the plain CLIP [adapted]",
    )
    group = parser.add_argument_group("feedback loop")
    group.add_argument(
        "--feedback",
        choices=FEEDBACK,
        default="adapted",
        help="what Stage 1 of loop 2 and later looks at: V1..V4 of the trained image side, the plain CLIP's tokens "
        "through the trained projectors, or loop 1's frozen features",
    )
    group.add_argument(
        "--text_epoch",
        type=arguments.at_least(1),
        nargs="+",
        default=[5, 3, 2],
        help="epochs of Stage 1, loop by loop; the last repeats",
    )
    group.add_argument(
        "--image_epoch", type=arguments.at_least(1), nargs="+", default=[20, 10, 5], help="the same of Stage 2"
    )
    group.add_argument(
        "--lr_decay", type=arguments.positive, default=0.5, help="loop k has its learning rates x this^(k-1)"
    )
    group.add_argument(
        "--optimizer_state",
        choices=("reset", "carry"),
        default="reset",
        help="Adam's moments at the start of later loops",
    )
    parser.add_argument(
        "--eval_dataset",
        nargs="+",
        default=[],
        help="data sets to test every loop on, beside the base, as test.py does; nothing is chosen by it",
    )
    arguments.add_training_arguments(parser, stage1_levels="all")
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    arguments.add_run_arguments(parser)
    return parser.parse_args()


def run_folder(args: argparse.Namespace) -> Path:
    """Folder of the run, never that of the checkpoint it starts from."""
    if args.resume is None:
        return args.save_path or Path("ckpt") / "<base>_feedback"
    source = args.resume if args.resume.is_dir() else args.resume.parent
    folder = args.save_path or Path("ckpt") / f"{source.resolve().name}_feedback"
    if folder.resolve() == source.resolve():
        raise ValueError(f"--save_path {folder}: holds the checkpoint of --resume. Choose another folder.")
    return folder


def check_loop_file(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise ValueError or FileNotFoundError where a run cannot go on from this loop file as asked."""
    if args.loops <= checkpoint.loop:
        raise ValueError(f"--loops {args.loops}: {checkpoint.path} is loop {checkpoint.loop} already; ask for more.")
    if args.optimizer_state == "carry":
        raise ValueError("--optimizer_state carry: loop files hold no optimiser. Extend the run in its own folder.")
    load_checkpoint(checkpoint.path.parent / "loop_0.pth")  # the base, which belongs beside it


def start_of(checkpoint: Checkpoint) -> dict:
    """What the run starts from: the base, and the loop file where it goes on from one."""
    if not checkpoint.is_loop_file:
        return checkpoint.base
    continued = {"path": checkpoint.path.as_posix(), "sha256": checkpoints.file_sha256(checkpoint.path)}
    return checkpoint.base | {"continued_from": continued, "datasets": checkpoint.seen()}


def save_loop(trainer: Trainer, loop: int) -> None:
    """Write loop_<loop>.pth: the four modules as they are, and all that tells how they came to be."""
    path = trainer.folder / f"loop_{loop}.pth"
    content = {
        **checkpoints.states(trainer.model),
        **trainer.plan.header,
        "loop": loop,
        "metrics": trainer.metrics,
        "calibration": trainer.calibrate(),
        "environment": checkpoints.environment(trainer.model.backbone, trainer.device),
    }
    checkpoints.save(content, path)
    logger.info("Saved %s", path)


def open_eval_sets(args: argparse.Namespace) -> list[DataSet]:
    """The data sets of --eval_dataset, their files checked, so that a bad one is found before training."""
    data_sets = open_all(args.eval_dataset, args.data_root)
    for data in data_sets:
        check_files(data.folder, data.records)
    return data_sets


def test_loop(trainer: Trainer, loop: int, data_sets: list[DataSet], banks: list[PromptBank]) -> None:
    """Test a loop that was saved beside the base, as test.py does, and log the row of the average."""
    backbone, precision = trainer.model.backbone, trainer.settings.precision

    def build(checkpoint: Checkpoint) -> CrossAttentionCLIP:
        return checkpoints.build_model(trainer.plan.config, backbone, checkpoint, trainer.device)

    batching = Batching(EVAL_BATCH, trainer.num_workers, precision)
    for data, bank in zip(data_sets, banks, strict=True):
        with torch.random.fork_rng():  # the training's generator must not move
            tested = load_models([trainer.folder / f"loop_{loop}.pth"], [], build)
        evaluate(tested, data, bank, batching, RESAMPLES, seed=0)
        for each in tested:
            tables.write_results(each, data, precision)
        table = tables.text_table(tested, data, tables.shown_classes(tested)[-1:])
        logger.info("\n".join([f"{data.name}, in percent", table, *tables.notes(tested, data)]))


def main() -> None:
    args = parse_arguments()
    if args.resume is None and not args.dry_run:
        raise ValueError(
            "--resume is needed, also to go on: the folder of a base model (train.py makes one) or a loop file."
        )
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint and checkpoint.is_loop_file:
        check_loop_file(args, checkpoint)
    both = {"text_cross_attn": True, "image_cross_attn": True}
    config, assumed = arguments.resolve_model(args, checkpoint, defaults=both)
    settings = arguments.settings_of(args)
    loops = range(checkpoint.loop + 1 if checkpoint else 1, args.loops + 1)
    files = [*(f"loop_{loop}.pth" for loop in (0, *loops)), "state.pth", "train.log", "log.csv", "training.png"]
    files += [f"loop_<k>_{canonical_name(name)}.csv, _images.csv" for name in args.eval_dataset]
    files += ["tensorboard/"] if args.tensorboard else []
    base = start_of(checkpoint) if checkpoint else {}
    run = Run(config, settings, plan_stages(settings, loops), run_folder(args), files, base)

    data_sets = [] if args.dry_run else open_eval_sets(args)
    banks: list[PromptBank] = []

    def on_stage_end(trainer: Trainer, stage: Stage) -> None:
        """A loop ends with Stage 2."""
        if stage.name == "image":
            save_loop(trainer, stage.loop)
            draw_training(trainer.folder / "log.csv", trainer.folder / "training.png")
            test_loop(trainer, stage.loop, data_sets, banks)

    def on_start(trainer: Trainer) -> None:
        backbone = trainer.model.backbone
        for data in data_sets:
            check_grid(backbone.grid, data.domain)
            banks.append(PromptBank(backbone, data.descriptions))
        keep_base(trainer)

    def keep_base(trainer: Trainer) -> None:
        if assumed:
            logger.info("%s names no backbone. Assumed: %s", args.resume, " ".join(assumed))
        if (trainer.folder / "loop_0.pth").exists():
            return
        if checkpoint.is_loop_file:
            checkpoints.save(checkpoints.read(args.resume.parent / "loop_0.pth"), trainer.folder / "loop_0.pth")
        else:
            save_loop(trainer, 0)

    trainer = start(args, run, checkpoint, on_stage_end, on_start=on_start)
    if trainer is not None:
        trainer.run()
        last = trainer.folder / f"loop_{args.loops}.pth"
        logger.info("Done. Compare with the base: python test.py --ckpt %s --dataset NAME", last)


if __name__ == "__main__":
    run_script(main)
