"""From a plan to a trainer that is ready to run, new or where an earlier start stopped; both scripts begin here."""

import logging
from pathlib import Path

from model.adapter_cross_attention import ModelConfig
from model.backbone import load_backbone
from utils import checkpoints
from utils.checkpoints import Checkpoint
from utils.machine import Machine
from utils.models import build_model, check_clip
from utils.options import completed
from utils.settings import Settings
from utils.training.data import load_training_data
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
    open_board = tensorboard_writer() if tensorboard else None
    config = plan.config
    data = load_training_data(plan.settings, machine.data_root, config.img_size, in_memory)
    backbone = load_backbone(config.model_name, config.img_size, config.quick_gelu, machine.clip_weights)
    model = build_model(config, backbone, checkpoint, machine.device, plan.settings.seed)
    trainer = Trainer(model, data, plan, state, machine.num_workers, open_board)
    if state:
        check_clip(state["clip_sha256"], backbone, f"{plan.folder}: this run has CLIP weights of SHA-256")
        check_data(state, data.summary, plan.folder)
    logger.info("%s\n\nCLIP weights of SHA-256 %s\n", description, backbone.sha256)
    return trainer


def open_run(plan: Plan) -> dict | None:
    """The state of a run that has begun, or None for a new one. Writes nothing.

    Raises ValueError where the folder holds anything else, or a run of another base, other arguments or more loops.
    """
    folder, header = plan.folder, plan.header
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    loops = checkpoints.loop_files(folder)
    rescue = f", or go on from {loops[-1]} with --resume and a new --save_path" if loops else ""
    path = folder / checkpoints.STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} exists and has no {path.name}, so no run goes on there. Choose another --save_path{rescue}."
        )
    try:
        state = checkpoints.read(path)
        checkpoints.expect(state, path, config=dict, base=dict, position=tuple)
    except ValueError as error:
        raise ValueError(f"{error} Choose another --save_path{rescue}.") from error
    if _origin(state) != _origin(header):
        raise ValueError(
            f"{folder} holds a run that started from another base, {state['base']}. Choose another --save_path."
        )
    if changed := differences(state["config"], header["config"]):
        raise ValueError(
            f"{folder} holds a run with other arguments:\n"
            + "\n".join(changed)
            + "\nRepeat the earlier ones to go on, or choose another --save_path."
        )
    finished = state["position"][0] - 1
    if plan.last_loop < finished:
        raise ValueError(f"--loops {plan.last_loop}: the run in {folder} already has {finished} loops.")
    return state


def _origin(header: dict) -> tuple:
    """Hashes of the files that a run starts from."""
    base = header.get("base", {})
    return base.get("sha256"), base.get("continued_from", {}).get("sha256")


def differences(before: dict, now: dict) -> list[str]:
    """A line for each argument of a run that is not what it was."""
    pairs = (
        (completed(ModelConfig, before["model"]), now["model"]),
        (completed(Settings, before["training"]), now["training"]),
    )
    return [
        f"  {name}: {old.get(name)} before, {new.get(name)} now"
        for old, new in pairs
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def check_data(state: dict, found: dict, folder: Path) -> None:
    """Raise ValueError where the images of a run that goes on are not those it began with."""
    recorded = state.get("data", found)  # older runs do not tell
    if recorded != found:
        raise ValueError(
            f"{folder}: this run began with {recorded['images']} images to train on and {recorded['held_out']} held "
            f"out; now there are {found['images']} and {found['held_out']}, or others of the same number (where images "
            "were added, --shot draws others). Bring back the folder as it was to go on, or choose another --save_path."
        )
