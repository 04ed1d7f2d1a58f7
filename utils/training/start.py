"""From a plan to a trainer that is ready to run, new or where an earlier start stopped; both scripts begin here."""

import argparse
import logging
from functools import partial
from typing import NamedTuple

from dataset.files import check_place
from model.backbone import load_backbone
from utils import processes
from utils.checkpoints import STATE_FILE, Checkpoint, model_sha256
from utils.machine import Machine
from utils.models import build_model, check_clip, check_modules, compile_models
from utils.training.data import load_training_data
from utils.training.folder import check_data, check_free, check_state, open_run
from utils.training.log import tensorboard_writer
from utils.training.plan import Plan, describe_plan
from utils.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Around(NamedTuple):
    """What a training does beside, of `add_training_arguments`."""

    cache_images: bool = False
    tensorboard: bool = False
    accumulate: int = 1
    grad_checkpointing: bool = False
    compile: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Around":
        """From arguments of these names."""
        return cls(*(getattr(args, name) for name in cls._fields))


def start(plan: Plan, checkpoint: Checkpoint | None, machine: Machine, around: Around) -> Trainer | None:
    """A trainer at the beginning of `plan` or where it stopped; None where nothing is left to train.

    `checkpoint` is what the run starts from, None for a fresh base. Nothing of the run is written yet. Raises
    ValueError or OSError for bad input.
    """
    description = describe_plan(plan)  # which finds what does not fit the model, before anything is read or made
    check_processes(plan, machine, around.accumulate)
    state = processes.from_first(partial(open_run, plan))
    if state and state["position"][0] > plan.last_loop:
        logger.info("%s is finished up to loop %d; there is nothing left to train.", plan.folder, plan.last_loop)
        return None
    if processes.is_first():
        check_place(plan.folder, "--save_path")
        check_free(plan.folder)
    open_board = tensorboard_writer() if around.tensorboard else None
    config = plan.config
    data = load_training_data(plan.settings, machine, config.img_size, around.cache_images)
    backbone = load_backbone(config.model_name, config.img_size, config.quick_gelu, machine.clip_weights)
    model = build_model(config, backbone, checkpoint, machine.device, plan.settings.seed)
    if model.sees_another_image:
        data = data.with_partners(plan.settings.seed)
    same = {"CLIP weights": backbone.sha256, "images to train on": data.summary}
    processes.check_alike(lambda: {**same, "weights to start from": model_sha256(model)})
    backbone.recompute = around.grad_checkpointing
    if around.compile:
        compile_models([model])
    trainer = Trainer(model, data, plan, state, machine.num_workers, open_board, around.accumulate)
    if state:
        check_clip(state["clip_sha256"], backbone, f"{plan.folder}: this run has CLIP weights of SHA-256")
        check_data(state, data.summary, plan.folder)
        check_modules(model, state["modules"], plan.folder / STATE_FILE)
        check_state(state, plan, list(model.trainable()), trainer.steps_per_epoch)
    logger.info("%s\n\nCLIP weights of SHA-256 %s\n", description, backbone.sha256)
    if processes.count() > 1:
        logger.info("%d processes share each batch.", processes.count())
    return trainer


def check_processes(plan: Plan, machine: Machine, pieces: int) -> None:
    """Raise ValueError where the processes of the job cannot share a batch, or are not alike."""
    for stage in plan.stages[:2]:
        if stage.batch_size < processes.count():
            raise ValueError(
                f"--{stage.name}_batch_size {stage.batch_size}: {processes.count()} processes share a batch, and each "
                "needs an image of it. Ask for more images, or start fewer processes."
            )
    if pieces > plan.settings.image_batch_size:
        raise ValueError(
            f"--accumulate {pieces}: a batch of Stage 2 has {plan.settings.image_batch_size} images "
            "(--image_batch_size), which cannot be cut into more pieces."
        )
    flags = {f"--{name}": value for part in plan.header["config"].values() for name, value in part.items()}
    more = {"--loops": plan.last_loop, "the kind of --device": machine.device.type}
    processes.check_alike(lambda: flags | more)
