"""Training: the two stages of each loop, shared by both trainers, with exact continuation."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset.files import write_text
from dataset.loading import Batch, SeededSampler
from dataset.records import Record, write_records
from dataset.transforms import Transform
from forward_utils_cross_attention import (
    ClassText,
    Part,
    PromptBank,
    Sight,
    encode,
    encode_sight,
    see_stage1,
    stage1_loss,
    stage2_loss,
)
from model.adapter_cross_attention import STAGES, CrossAttentionCLIP
from utils import checkpoints, processes
from utils.errors import TrainingError, TrainingStoppedError
from utils.judging import Detector
from utils.logs import log_to_file, progress
from utils.signals import StopSignal
from utils.training.calibrate import calibrate
from utils.training.data import TrainingData
from utils.training.features import SeenSteps, choose_place, remove_kept
from utils.training.folder import check_unchanged, locked
from utils.training.guard import guarded
from utils.training.log import TrainingLog
from utils.training.measures import (
    Means,
    add_up,
    added_terms,
    gradient_norms,
    to_floats,
    update_norms,
    with_added_shares,
)
from utils.training.optimizer import make_optimizer, set_learning_rates
from utils.training.plan import VAL_CLASSES_FILE, Plan, Position, Stage, shot_file, vv_start
from utils.training.steps import Step, Steps

logger = logging.getLogger(__name__)

SAVE_SECONDS = 300
# On a GPU the measures of so many steps are fetched at once: it would wait for the program at each.
FETCH_STEPS = 10


class Measured(NamedTuple):
    """A step whose measures are on the device: `own` add up over the processes, all have the same of the others.

    `updates` are there once the optimiser's step is done.
    """

    position: Position
    records: list[Record]
    rates: dict[str, float]
    own: dict[str, Tensor]
    gradients: dict[str, Tensor]
    updates: dict[str, Tensor]


class Losses(nn.Module):
    """The losses of a trainer as a module, which `DistributedDataParallel` needs."""

    def __init__(self, trainer: "Trainer"):
        super().__init__()
        self.model, self._losses = trainer.model, trainer.losses

    def forward(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._losses(*arguments)


class Trainer:
    """Trains `model` as `plan` says; `state` is that of an earlier start, which the training goes on from.

    Until it does, the model is what the run starts from. `pieces`: how many pieces a batch of Stage 2 goes through the
    model in.
    """

    def __init__(
        self,
        model: CrossAttentionCLIP,
        data: TrainingData,
        plan: Plan,
        state: dict | None = None,
        num_workers: int = 0,
        open_board: Callable | None = None,
        pieces: int = 1,
    ):
        self.model, self.data, self.plan, self.num_workers = model, data, plan, num_workers
        self.settings, self.folder, self.device = plan.settings, plan.folder, model.backbone.device
        self.bank = PromptBank(model.backbone, data.descriptions, data.domain)
        self.vv_start = vv_start(plan.settings, model.backbone)
        self.position = Position(plan.stages[0].loop, plan.stages[0].name)
        self.optimizer_states: dict[str, dict] = {}
        self.log = TrainingLog(plan, open_board)
        self.stop = StopSignal()
        self.pieces = pieces
        keeps = self.settings.cache_features
        self.features_place = choose_place(model, len(data.train), self.folder) if keeps else None
        self.fetch_steps = FETCH_STEPS if self.device.type == "cuda" else 1
        self._state = state
        self._saved_at = time.monotonic()
        self._optimizer: torch.optim.Adam | None = None  # of the running stage
        self._waiting: list[Measured] = []
        self._stopping = False  # a signal came to one of the processes

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
        if not processes.is_first():
            return
        if self._optimizer:
            self.optimizer_states[self.position.stage] = self._optimizer.state_dict()
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
        with ExitStack() as stack:
            if processes.is_first():
                stack.enter_context(locked(self.folder))
                check_unchanged(self.plan, self._state)
                remove_kept(self.folder)
                self.open_folder()
            processes.wait()
            self.stop = stack.enter_context(guarded(self.folder, self._tried, self._rescue))
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
        self._optimizer = make_optimizer(model.learned(name), stage, earlier)
        text = ClassText(model, self.bank, fixed=name == "image")
        dataset = self.data.images(self.data.train, self._transform(name))
        sampler = SeededSampler(len(dataset), (self.settings.seed, stage.loop, STAGES.index(name)))
        pieces = self.pieces if name == "image" else 1
        drawn = Steps(dataset, stage.batch_size, self.num_workers, self.device, sampler, pieces)
        steps: Steps | SeenSteps = drawn
        # Without a mask in a batch Stage 2's projectors have no gradient; Stage 1 has its orthogonal term.
        all_used = name == "text" or all(record.has_mask for record in self.data.train)
        losses = processes.with_mean_gradients(Losses(self), all_used)
        per_epoch = self.steps_per_epoch(stage)
        title = f"loop {stage.loop}/{self.plan.last_loop} {stage.title}"
        done = self.position.epoch * per_epoch + self.position.step
        with ExitStack() as stack:
            if name == "text" and self.settings.cache_features:
                seen = stack.enter_context(closing(SeenSteps(self.features_place, sampler.key)))
                seen.fill(drawn, partial(self.see, stage, text=text), title, self._check_stop)
                steps = seen
            bar = stack.enter_context(progress(total=stage.epochs * per_epoch, initial=done, desc=title, unit="step"))
            while self.position.epoch < stage.epochs:
                bar.set_description(f"{title} epoch {self.position.epoch + 1}/{stage.epochs}", refresh=False)
                self.run_epoch(stage, steps, losses, self._optimizer, text, bar)
        self.optimizer_states[name], self._optimizer = self._optimizer.state_dict(), None
        self.model.open_gates(stage.name, 1)
        masks = sum(record.mask_path is not None for record in self.data.train)
        self.log.stage(stage, model.trainable(), masks)

    def run_epoch(
        self,
        stage: Stage,
        steps: Steps | SeenSteps,
        losses: nn.Module,
        optimizer: torch.optim.Adam,
        text: ClassText,
        bar: tqdm,
    ) -> None:
        """Train what is left of the current epoch, log it and save the state."""
        started, per_epoch = time.monotonic(), self.steps_per_epoch(stage)
        in_all, before = stage.epochs * per_epoch, self.position.epoch * per_epoch
        # Where the epoch's steps are all done, its row still has the rates of the last one.
        rates = set_learning_rates(optimizer, stage, self.settings, before + per_epoch - 1, in_all)
        for step in steps.epoch(self.position.epoch, self.position.step):
            rates = set_learning_rates(optimizer, stage, self.settings, before + self.position.step, in_all)
            # In loop 1 from closed, where the model is the base.
            self.model.open_gates(stage.name, (before + self.position.step) / in_all if stage.loop == 1 else 1)
            last = self.position.step + 1 == per_epoch
            values = self.train_step(stage, step, losses, optimizer, text, rates, last)
            if values:
                bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{rates['lr']:.1e}", refresh=False)
                self._save_if_due()
            bar.update()
        seconds = time.monotonic() - started
        self.log.epoch(self.position, rates, seconds, self.validate(stage, text) if self.data.held_out else {})
        self.position = self.position._replace(epoch=self.position.epoch + 1, step=0)
        self.save()

    def train_step(
        self,
        stage: Stage,
        step: Step,
        losses: nn.Module,
        optimizer: torch.optim.Adam,
        text: ClassText,
        rates: dict[str, float],
        fetch: bool,
    ) -> dict[str, float] | None:
        """One step of the optimiser. The losses that it measures are those before it.

        Its measures wait on the device until they are many enough, or until `fetch`; then they are logged, and those of
        the last step returned.
        """
        modules = self.model.learned(stage.name)
        optimizer.zero_grad(set_to_none=True)
        own = self._backward(stage, step, losses, text)
        measured = Measured(self.position, step.records, rates, own, gradient_norms(modules), {})
        self._waiting.append(measured)
        self._stopping |= self._heard()
        fetch |= self._stopping or len(self._waiting) >= self.fetch_steps
        # Before the step, so that where another process is lost meanwhile, this one is where it was before it.
        before = self._fetch() if fetch else []
        with update_norms(modules) as updates:
            optimizer.step()
        measured.updates.update(updates)
        self.position = self.position._replace(step=self.position.step + 1)
        return self._log_steps(before) if fetch else None

    def _backward(self, stage: Stage, step: Step, losses: nn.Module, text: ClassText) -> dict[str, Tensor]:
        """Gradients of a step's loss; this process's part of its measures."""
        own: dict[str, Tensor] = {}
        for number, (batch, part, sight) in enumerate(step.pieces, start=1):
            ahead = isinstance(losses, DistributedDataParallel) and number < len(step.pieces)
            with cast(DistributedDataParallel, losses).no_sync() if ahead else nullcontext():
                with added_terms(self.model) as added:
                    loss, terms = losses(stage, batch, text, part, step.lengths, sight)
                # Of the gradients, the mean over the processes is taken, of losses that add up.
                (processes.count() * loss).backward()
            counts = bool(part.images)
            emptied = torch.full((), float(batch["emptied"].sum()), device=self.device)
            add_up(own, {"loss": loss, **terms})
            add_up(own, {name: counts * value for name, value in {**added, "emptied_masks": emptied}.items()})
        return own

    def _fetch(self) -> list[dict[str, float]]:
        """What was measured before the updates of the steps that wait. Raises TrainingError where it is not finite."""
        sums = to_floats([step.own for step in self._waiting], processes.total)
        norms = to_floats([step.gradients for step in self._waiting])
        found = [own | gradients for own, gradients in zip(sums, norms, strict=True)]
        for step, values in zip(self._waiting, found, strict=True):
            self._check_finite(values, step.position, step.records, "what came of it is not saved")
        return [with_added_shares(values) for values in found]

    def _log_steps(self, before: list[dict[str, float]]) -> dict[str, float]:
        """Log the steps that wait; the values of the last one. Raises TrainingError where an update is not finite."""
        values: dict[str, float] = {}
        updates = to_floats([step.updates for step in self._waiting])
        for step, measured, moved in zip(self._waiting, before, updates, strict=True):
            self._check_finite(moved, step.position, step.records, "the step that made it so is not saved")
            values = measured | moved
            self.log.step(step.position, values, step.rates)
        self._waiting.clear()
        return values

    def _heard(self) -> bool:
        """Whether a signal came to one of the processes."""
        return processes.total(torch.tensor(float(self.stop.received is not None))).item() > 0

    def _check_stop(self) -> None:
        """Raise TrainingStoppedError, in all processes, where a signal came; for work that is simply done again."""
        if self._heard():
            raise TrainingStoppedError(f"Stopped by {self._signal}. The same command goes on from here.")

    @property
    def _signal(self) -> str:
        return self.stop.received or "a signal to another process"

    def losses(
        self,
        stage: Stage,
        batch: Batch,
        text: ClassText,
        part: Part,
        lengths: list[int],
        sight: Sight | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the stage on a part of a batch, and its terms without gradient; `lengths` are those of all parts.

        `sight` is what Stage 1 saw of it, where that is kept.
        """
        settings, model, class_names = self.settings, self.model, batch["class_name"]
        target = {
            "mask": batch["mask"].to(self.device, non_blocking=True),
            "label": batch["label"].to(self.device, non_blocking=True),
            "has_mask": batch["has_mask"],
        }
        if stage.features is not None:  # Stage 1, which looks at something
            sight = self.see(stage, batch, lengths, text) if sight is None else self._on_device(sight)
            encoding = encode_sight(model, sight, class_names, text, settings.precision)
            levels, norm_weight = settings.stage1_levels, settings.text_norm_weight
            loss, terms = stage1_loss(encoding, model.backbone.scale, target, levels, norm_weight, part)
        else:
            images = batch["image"].to(self.device, non_blocking=True)
            encoding = encode(model, images, class_names, text, settings.precision, other=batch.get("other"))
            loss, terms = stage2_loss(encoding, model.backbone.scale, target, settings.det_temperature, part)
        anchors = encoding.anchors
        # 0 where the normal and the abnormal anchor are one, 1 where they are orthogonal.
        terms["anchor_separation"] = part.images * (1 - (anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean())
        return loss, {name: term.detach() for name, term in terms.items()}

    def see(self, stage: Stage, batch: Batch, lengths: list[int], text: ClassText) -> Sight:
        """What Stage 1 sees of a part of a batch; `lengths` as in `losses`."""
        images = batch["image"].to(self.device, non_blocking=True)
        return see_stage1(
            self.model,
            images,
            batch["class_name"],
            text,
            str(stage.features),
            self.vv_start,
            self.settings.vv_attention == "batch",
            self.settings.precision,
            batch.get("other"),
            partial(processes.joined_rows, lengths=lengths),
        )

    def _on_device(self, sight: Sight) -> Sight:
        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, non_blocking=True)

        patches = [level.to(self.device, non_blocking=True) for level in sight.patches]
        return Sight(patches, there(sight.context), there(sight.neighbours))

    @torch.no_grad()
    def validate(self, stage: Stage, text: ClassText) -> dict[str, float]:
        """Means of the stage's losses on the held-out images, without augmentation."""
        means = Means()
        dataset = self.data.images(self.data.held_out, self._transform(None))
        steps = Steps(dataset, stage.batch_size, self.num_workers, self.device)
        for step in progress(steps.epoch(), desc="held out", leave=False, total=len(steps)):
            own: dict[str, Tensor] = {}
            for batch, part, sight in step.pieces:
                loss, terms = self.losses(stage, batch, text, part, step.lengths, sight)
                add_up(own, {"loss": loss, **terms})
            (values,) = to_floats([own], processes.total)
            therefore = "these images are held out, the epoch before is not saved as done"
            self._check_finite(values, self.position, step.records, therefore)
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

    def _check_finite(
        self, values: Mapping[str, float], position: Position, records: list[Record], therefore: str
    ) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                files = "\n  ".join(str(self.data.folder / record.image_path) for record in records)
                raise TrainingError(
                    f"{name} is {value} at {position}; {therefore}. The batch:\n  {files}\n"
                    f"The last good state is in {self.folder}. Look at these files, or lower the learning rate."
                )

    def _save_if_due(self) -> None:
        if self._stopping or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()
        if self._stopping:
            raise TrainingStoppedError(
                f"Stopped by {self._signal} at {self.position}; the state is saved in {self.folder}. "
                "The same command goes on from here."
            )

    def _rescue(self) -> None:
        """Save the state where this process is between two steps that are both logged, or before the optimiser's."""
        if all(step.position == self.position for step in self._waiting):
            self.save()

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
