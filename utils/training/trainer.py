"""Training: the two stages of each loop, shared by both trainers, with exact continuation."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.files import write_text
from dataset.loading import Batch, SeededSampler, make_loader
from dataset.records import write_records
from dataset.transforms import Transform
from forward_utils_cross_attention import ClassText, PromptBank, encode, encode_stage1, stage1_loss, stage2_loss
from model.adapter_cross_attention import STAGES, CrossAttentionCLIP
from utils import checkpoints
from utils.errors import TrainingError, TrainingStoppedError
from utils.judging import Detector
from utils.logs import log_to_file, progress
from utils.signals import StopSignal
from utils.training.calibrate import calibrate
from utils.training.data import TrainingData
from utils.training.folder import check_unchanged, locked
from utils.training.guard import guarded
from utils.training.log import TrainingLog
from utils.training.measures import Means, added_terms, gradient_norms, to_floats, update_norms
from utils.training.optimizer import make_optimizer, set_learning_rates
from utils.training.plan import VAL_CLASSES_FILE, Plan, Position, Stage, shot_file, vv_start

logger = logging.getLogger(__name__)

SAVE_SECONDS = 300


class Trainer:
    """Trains `model` as `plan` says; `state` is that of an earlier start, which the training goes on from.

    Until it does, the model is what the run starts from.
    """

    def __init__(
        self,
        model: CrossAttentionCLIP,
        data: TrainingData,
        plan: Plan,
        state: dict | None = None,
        num_workers: int = 0,
        open_board: Callable | None = None,
    ):
        self.model, self.data, self.plan, self.num_workers = model, data, plan, num_workers
        self.settings, self.folder, self.device = plan.settings, plan.folder, model.backbone.device
        self.bank = PromptBank(model.backbone, data.descriptions, data.domain)
        self.vv_start = vv_start(plan.settings, model.backbone)
        self.position = Position(plan.stages[0].loop, plan.stages[0].name)
        self.optimizer_states: dict[str, dict] = {}
        self.log = TrainingLog(plan, open_board)
        self.stop = StopSignal()
        self._state = state
        self._saved_at = time.monotonic()

    @property
    def past(self) -> int:
        """The last loop that an earlier start finished, 0 where there is none."""
        return self._state["position"][0] - 1 if self._state else 0

    # state

    def open_folder(self) -> None:
        """Log to the run's folder. A new run is named there before all else by its state."""
        if self._state is None:
            self.save()
        log_to_file(self.folder / "train.log")
        drawn, classes = self.folder / shot_file(self.settings), self.folder / VAL_CLASSES_FILE
        if self.settings.shot is not None:  # also where it is there, perhaps cut short
            write_records(drawn, self.data.train + self.data.held_out)
        if self.settings.val_classes and not classes.is_file():
            held_out = dict.fromkeys(record.class_name for record in self.data.held_out)
            write_text(classes, "\n".join([*held_out, ""]))

    def save(self) -> None:
        """Write all that exact continuation needs."""
        checkpoints.save(
            {
                **self.plan.header,
                "modules": checkpoints.states(self.model),
                "optimizers": self.optimizer_states,
                "position": tuple(self.position),
                **self.log.state(),
                "rng": torch.get_rng_state(),
                "clip_sha256": self.model.backbone.sha256,
                "data": self.data.summary,
            },
            self.folder / checkpoints.STATE_FILE,
        )
        self._saved_at = time.monotonic()

    def _restore(self, state: dict) -> None:
        """Take up a state of `save`."""
        for name, module in self.model.trainable().items():
            module.load_state_dict(state["modules"][name])
        self.optimizer_states = state["optimizers"]
        self.position = Position(*state["position"])
        self.log.restore(state)
        # Nothing draws from it today; a module that does (dropout, say) goes on as it would have.
        torch.set_rng_state(state["rng"])

    # the run

    @contextmanager
    def running(self) -> Iterator[None]:
        """The run's folder is open and its own; signals end the running step, what fails is a TrainingError.

        Raises ValueError where another process trains there.
        """
        with locked(self.folder):
            check_unchanged(self.plan, self._state)
            self.open_folder()
            with guarded(self.folder, self._tried) as self.stop:
                yield

    def stages(self) -> Iterator[Stage]:
        """Train what is left, stage by stage; each is handed out when it is trained, before that is saved as done."""
        if self._state:
            self._restore(self._state)
            logger.info("Going on at %s.", self.position)
        self.log.open(self.position)
        self._saved_at = time.monotonic()
        now = self.position.order()
        for stage in self.plan.stages:
            if Position(stage.loop, stage.name).order()[:2] < now[:2]:
                continue
            self.run_stage(stage)
            yield stage
            self.position = Position(stage.loop, "image") if stage.name == "text" else Position(stage.loop + 1, "text")
            self.save()

    def run_stage(self, stage: Stage) -> None:
        """Train one stage from the current position to its end."""
        model, name = self.model, stage.name
        begun = self.position != Position(stage.loop, name)
        model.set_stage(name)
        earlier = self.optimizer_states[name] if begun else None
        if not begun and self.settings.optimizer_state == "carry":
            earlier = self.optimizer_states.get(name)  # loop 1 has none
        optimizer = make_optimizer(model.learned(name), stage, earlier)
        text = ClassText(model, self.bank, fixed=name == "image")
        dataset = self.data.images(self.data.train, self._transform(name))
        sampler = SeededSampler(len(dataset), (self.settings.seed, stage.loop, STAGES.index(name)))
        loader = make_loader(dataset, stage.batch_size, self.num_workers, sampler, self.device)
        steps = self.steps_per_epoch(stage)
        title = f"loop {stage.loop}/{self.plan.last_loop} {stage.title}"
        done = self.position.epoch * steps + self.position.step
        with progress(total=stage.epochs * steps, initial=done, desc=title, unit="step") as bar:
            while self.position.epoch < stage.epochs:
                bar.set_description(f"{title} epoch {self.position.epoch + 1}/{stage.epochs}", refresh=False)
                sampler.set_epoch(self.position.epoch, skip=self.position.step * stage.batch_size)
                self.run_epoch(stage, loader, optimizer, text, bar)
        self.model.open_gates(stage.name, 1)
        masks = sum(record.mask_path is not None for record in self.data.train)
        self.log.stage(stage, model.trainable(), masks)

    def run_epoch(
        self, stage: Stage, loader: DataLoader, optimizer: torch.optim.Adam, text: ClassText, bar: tqdm
    ) -> None:
        """Train what is left of the current epoch, log it and save the state."""
        started, per_epoch = time.monotonic(), self.steps_per_epoch(stage)
        steps, before = stage.epochs * per_epoch, self.position.epoch * per_epoch
        # Where the epoch's steps are all done, its row still has the rates of the last one.
        rates = set_learning_rates(optimizer, stage, self.settings, before + per_epoch - 1, steps)
        for batch in loader:
            rates = set_learning_rates(optimizer, stage, self.settings, before + self.position.step, steps)
            # In loop 1 from closed, where the model is the base.
            self.model.open_gates(stage.name, (before + self.position.step) / steps if stage.loop == 1 else 1)
            values = self.train_step(stage, batch, optimizer, text)
            self.log.step(self.position, values, rates)
            self.position = self.position._replace(step=self.position.step + 1)
            bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{rates['lr']:.1e}", refresh=False)
            bar.update()
            self._save_if_due(stage.name, optimizer)
        self.optimizer_states[stage.name] = optimizer.state_dict()
        seconds = time.monotonic() - started
        self.log.epoch(self.position, rates, seconds, self.validate(stage, text) if self.data.held_out else {})
        self.position = self.position._replace(epoch=self.position.epoch + 1, step=0)
        self.save()

    def train_step(self, stage: Stage, batch: Batch, optimizer: torch.optim.Adam, text: ClassText) -> dict[str, float]:
        """One step of the optimiser; the values of its log row. The losses are those before the step."""
        modules = self.model.learned(stage.name)
        optimizer.zero_grad(set_to_none=True)
        with added_terms(self.model) as added:
            loss, terms = self.losses(stage, batch, text)
        loss.backward()
        values = to_floats({"loss": loss.detach(), **terms, **added, **gradient_norms(modules)})
        values["emptied_masks"] = int(batch["emptied"].sum())
        self._check_finite(values, batch, "no step was made")
        with update_norms(modules) as updates:
            optimizer.step()
        moved = to_floats(updates)
        self._check_finite(moved, batch, "the step that made it so is not saved")
        return values | moved

    def losses(self, stage: Stage, batch: Batch, text: ClassText) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the stage on a batch, and its terms without gradient."""
        settings, model = self.settings, self.model
        images, class_names = batch["image"].to(self.device, non_blocking=True), batch["class_name"]
        other = batch.get("other")
        target = {
            "mask": batch["mask"].to(self.device, non_blocking=True),
            "label": batch["label"].to(self.device, non_blocking=True),
            "has_mask": batch["has_mask"],
        }
        if stage.features is not None:  # Stage 1, which looks at something
            across_batch = settings.vv_attention == "batch"
            encoding = encode_stage1(
                model, images, class_names, text, stage.features, self.vv_start, across_batch, settings.precision, other
            )
            levels, norm_weight = settings.stage1_levels, settings.text_norm_weight
            loss, terms = stage1_loss(encoding, model.backbone.scale, target, levels, norm_weight)
        else:
            encoding = encode(model, images, class_names, text, settings.precision, other=other)
            loss, terms = stage2_loss(encoding, model.backbone.scale, target, settings.det_temperature)
        anchors = encoding.anchors
        # 0 where the normal and the abnormal anchor are one, 1 where they are orthogonal.
        terms["anchor_separation"] = 1 - (anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean()
        return loss, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def validate(self, stage: Stage, text: ClassText) -> dict[str, float]:
        """Means of the stage's losses on the held-out images, without augmentation."""
        means = Means()
        dataset = self.data.images(self.data.held_out, self._transform(None))
        loader = make_loader(dataset, stage.batch_size, self.num_workers, device=self.device)
        for batch in progress(loader, desc="held out", leave=False):
            loss, terms = self.losses(stage, batch, text)
            values = to_floats({"loss": loss, **terms})
            self._check_finite(values, batch, "these images are held out, the epoch before is not saved as done")
            means.add(values)
        return means.get()

    def calibrate(self) -> dict | None:
        """The calibration of the model as it is, as checkpoints hold it; None where it cannot be fitted."""
        detector = Detector.of(self.model, self.bank, precision=self.settings.precision)
        return calibrate(detector, self.data, self.plan, self.num_workers, self.stop.check)

    # parts

    def steps_per_epoch(self, stage: Stage) -> int:
        """Steps of an epoch; the last batch may be a short one."""
        return math.ceil(len(self.data.train) / stage.batch_size)

    def _transform(self, stage: str | None) -> Transform:
        return Transform(self.model.backbone.img_size, stage, self.settings.augment)

    def _check_finite(self, values: dict[str, float], batch: Batch, therefore: str) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                files = "\n  ".join(batch["path"])
                raise TrainingError(
                    f"{name} is {value} at {self.position}; {therefore}. The batch:\n  {files}\n"
                    f"The last good state is in {self.folder}. Look at these files, or lower the learning rate."
                )

    def _save_if_due(self, stage: str, optimizer: torch.optim.Adam) -> None:
        if self.stop.received or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.optimizer_states[stage] = optimizer.state_dict()
            self.save()
        if self.stop.received:
            raise TrainingStoppedError(
                f"Stopped by {self.stop.received} at {self.position}; the state is saved in {self.folder}. "
                "The same command goes on from here."
            )

    def _tried(self) -> str:
        """Where the run is, what it needs memory for, and what to try instead."""
        flag, size = f"--{self.position.stage}_batch_size", self.model.backbone.img_size
        batch = getattr(self.settings, f"{self.position.stage}_batch_size")
        less = "Give the same command again with --grad_checkpointing. If that does not fit:\n"
        first = "" if self.model.backbone.recompute else less
        return (
            f"{self.position}. Tried: {flag} {batch}, --img_size {size}, --precision {self.settings.precision} "
            f"on {self.device}.\n{first}Start again in a new --save_path with a smaller {flag}"
        )
