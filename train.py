"""Train an AA-CLIP base model: Stage 1 adapts the text side, Stage 2 the image side.

    python train.py --dataset VisA

Writes AA-CLIP's text_adapter.pth and image_adapter.pth, and state.pth, train.log and log.csv; the same command run
again goes on where it stopped.
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import logging
import shlex
from pathlib import Path

from dataset.commands import path_argument, show
from utils import arguments, checkpoints, processes
from utils.cli import run_script
from utils.models import resolve_config
from utils.settings import add_settings, add_training_arguments, settings_of
from utils.training.estimate import describe_estimates
from utils.training.plan import Plan, Stage, describe_plan, plan_stages
from utils.training.start import Around, start
from utils.training.trainer import Trainer

logger = logging.getLogger("train")

FILES = {"text": checkpoints.TEXT_FILE, "image": checkpoints.IMAGE_FILE}
# A base model is one loop without the extension, trained as published.
PUBLISHED = {"text_epoch": [5], "image_epoch": [20], "stage1_levels": "last"}
ONE_LOOP = {"feedback": "off", "lr_decay": 1.0}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `words`."""
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--save_path", type=path_argument, default=Path("ckpt/baseline"), help="folder of the run")
    add_settings(parser, PUBLISHED, loops=False)
    add_training_arguments(parser)
    arguments.add_model_arguments(parser, "AA-CLIP's value, in brackets")
    arguments.add_run_arguments(parser)
    return parser.parse_args(words)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the run will do. Raises ValueError for arguments that do not go together."""
    settings = settings_of(args, ONE_LOOP)
    files = [*FILES.values(), "state.pth", "train.log", "log.csv"]
    config = resolve_config(arguments.model_flags(args))
    return Plan(config, settings, plan_stages(settings, range(1, 2)), args.save_path, files)


def save_stage(trainer: Trainer, stage: Stage) -> None:
    """Write AA-CLIP's file of the stage, with what rebuilds the model beside it."""
    name = f"{stage.name}_adapter"
    path = trainer.folder / FILES[stage.name]
    content = {
        "epoch": stage.epochs,
        name: checkpoints.states(trainer.model)[name],
        f"{stage.name}_optimizer": trainer.optimizer_states[stage.name],
        "config": trainer.plan.header["config"],
        "environment": checkpoints.environment(trainer.model.backbone, trainer.device),
    }
    if stage.name == "image":
        content["calibration"] = trainer.calibrate()
    if not processes.is_first():
        return
    checkpoints.save(content, path)
    logger.info("Saved %s", path)


def main() -> None:
    args = parse_arguments()
    plan = make_plan(args)
    if args.dry_run:
        how = args.device_tflops, args.grad_checkpointing, args.accumulate
        show(describe_plan(plan), "", describe_estimates(plan, *how))
        return
    trainer = start(plan, None, arguments.machine_of(args), Around.of(args))
    if trainer is None:
        return
    with trainer.running():
        for stage in trainer.stages():
            save_stage(trainer, stage)
    same = arguments.as_words(arguments.given(args, "dataset", "domain", "class_name", "shot"))
    command = ["python", "train_cross_attention.py", "--resume", str(trainer.folder), *same]
    logger.info("Done. Extend it: %s", shlex.join(command))


if __name__ == "__main__":
    run_script(main)
