"""From a plan to a trainer that is ready to run; both training scripts begin here."""

import argparse
import logging
from collections.abc import Callable

from forward_utils_cross_attention import check_grid
from model.backbone import load_backbone
from utils import arguments, checkpoints
from utils.checkpoints import Checkpoint
from utils.engine import Trainer, load_training_data
from utils.logs import tensorboard_writer
from utils.plan import Run, Stage, describe_plan

logger = logging.getLogger(__name__)


def start(
    args: argparse.Namespace,
    run: Run,
    checkpoint: Checkpoint | None,
    on_stage_end: Callable[[Trainer, Stage], None],
    on_start: Callable[[Trainer], None] = lambda trainer: None,
) -> Trainer | None:
    """A trainer at the beginning of `run` or where it stopped; None where there is nothing to train.

    With --dry_run the plan is printed, and nothing else happens. `on_start` gets the trainer before a state is taken
    up. Bad input raises ValueError or OSError before anything is written.
    """
    plan = describe_plan(run)
    if args.dry_run:
        print(plan)
        return None
    state = checkpoints.open_run(run)
    if state and state["position"][0] > run.last_loop:
        logger.info("%s is finished up to loop %d; there is nothing left to train.", run.folder, run.last_loop)
        return None
    device = arguments.device_of(args)
    tensorboard = tensorboard_writer() if args.tensorboard else None
    config = run.config
    data = load_training_data(run.settings, args.data_root, config.img_size, args.cache_images)
    backbone = load_backbone(config.model_name, config.img_size, config.quick_gelu, args.clip_weights)
    check_grid(backbone.grid, data.domain)
    model = checkpoints.build_model(config, backbone, checkpoint, device, run.settings.seed)
    trainer = Trainer(model, data, run, on_stage_end, arguments.workers_of(args), tensorboard)
    if state:
        what = f"{run.folder}: this run has CLIP weights of SHA-256"
        checkpoints.check_clip(state["clip_sha256"], backbone, what)
        checkpoints.check_data(state, data.summary, run.folder)
    trainer.open_folder(new=state is None)
    logger.info("%s\n\nCLIP weights of SHA-256 %s\n", plan, backbone.sha256)
    on_start(trainer)
    if state:
        trainer.restore(state)
        logger.info("Going on at %s.", trainer.position)
    return trainer
