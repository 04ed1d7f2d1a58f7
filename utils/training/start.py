"""From a plan to a trainer that is ready to run, new or where an earlier start stopped; both scripts begin here."""

import logging

from dataset.files import check_place
from model.backbone import load_backbone
from utils.checkpoints import STATE_FILE, Checkpoint
from utils.machine import Machine
from utils.models import build_model, check_clip, check_modules
from utils.training.data import load_training_data
from utils.training.folder import check_data, check_free, check_state, open_run
from utils.training.log import tensorboard_writer
from utils.training.plan import Plan, describe_plan
from utils.training.trainer import Trainer

logger = logging.getLogger(__name__)


def start(
    plan: Plan, checkpoint: Checkpoint | None, machine: Machine, in_memory: bool = False, tensorboard: bool = False
) -> Trainer | None:
    """A trainer at the beginning of `plan` or where it stopped; None where nothing is left to train.

    `checkpoint` is what the run starts from, None for a fresh base; `in_memory` keeps its images there. Nothing of the
    run is written yet. Raises ValueError or OSError for bad input.
    """
    description = describe_plan(plan)  # which finds what does not fit the model, before anything is read or made
    state = open_run(plan)
    if state and state["position"][0] > plan.last_loop:
        logger.info("%s is finished up to loop %d; there is nothing left to train.", plan.folder, plan.last_loop)
        return None
    check_place(plan.folder, "--save_path")
    check_free(plan.folder)
    open_board = tensorboard_writer() if tensorboard else None
    config = plan.config
    data = load_training_data(plan.settings, machine, config.img_size, in_memory)
    backbone = load_backbone(config.model_name, config.img_size, config.quick_gelu, machine.clip_weights)
    model = build_model(config, backbone, checkpoint, machine.device, plan.settings.seed)
    if model.sees_another_image:
        data = data.with_partners(plan.settings.seed)
    trainer = Trainer(model, data, plan, state, machine.num_workers, open_board)
    if state:
        check_clip(state["clip_sha256"], backbone, f"{plan.folder}: this run has CLIP weights of SHA-256")
        check_data(state, data.summary, plan.folder)
        check_modules(model, state["modules"], plan.folder / STATE_FILE)
        check_state(state, plan, list(model.trainable()), trainer.steps_per_epoch)
    logger.info("%s\n\nCLIP weights of SHA-256 %s\n", description, backbone.sha256)
    return trainer
