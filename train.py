"""Train an AA-CLIP base model: Stage 1 adapts the text side, Stage 2 the image side.

    python train.py --dataset VisA

Writes AA-CLIP's text_adapter.pth and image_adapter.pth, and state.pth, train.log and log.csv; the same command run
again goes on where it stopped.
"""

import argparse
import logging
import shlex
from pathlib import Path

from utils import arguments, checkpoints
from utils.cli import run_script
from utils.engine import Trainer
from utils.plan import Run, Stage, plan_stages
from utils.start import start

logger = logging.getLogger("train")

FILES = {"text": checkpoints.TEXT_FILE, "image": checkpoints.IMAGE_FILE}


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--save_path", type=Path, default="ckpt/baseline", help="folder of the run")
    parser.add_argument("--text_epoch", type=arguments.epochs, default="5", help="epochs of Stage 1")
    parser.add_argument("--image_epoch", type=arguments.epochs, default="20", help="epochs of Stage 2")
    arguments.add_training_arguments(parser, stage1_levels="last")
    arguments.add_model_arguments(parser, "AA-CLIP's value, in brackets")
    arguments.add_run_arguments(parser)
    # A base model is one loop without the extension.
    parser.set_defaults(
        feedback="off", lr_decay=1.0, optimizer_state="reset", text_cross_attn_lr=None, image_cross_attn_lr=None
    )
    return parser.parse_args()


def on_stage_end(trainer: Trainer, stage: Stage) -> None:
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
    checkpoints.save(content, path)
    logger.info("Saved %s", path)


def main() -> None:
    args = parse_arguments()
    config, _ = arguments.resolve_model(args)
    settings = arguments.settings_of(args)
    files = [*FILES.values(), "state.pth", "train.log", "log.csv"]
    run = Run(config, settings, plan_stages(settings, range(1, 2)), args.save_path, files)
    trainer = start(args, run, None, on_stage_end)
    if trainer is not None:
        trainer.run()
        same = arguments.given(args, "dataset", "domain", "class_name", "shot")
        command = ["python", "train_cross_attention.py", "--resume", str(trainer.folder), *same]
        logger.info("Done. Extend it: %s", shlex.join(command))


if __name__ == "__main__":
    run_script(main)
