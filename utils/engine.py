"""Training: the two stages of each loop, shared by both trainers, with exact continuation and the logs."""

import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.images import check_files
from dataset.loading import AnomalyDataset, ImageCache, SeededSampler, cache_images, loader_message, make_loader
from dataset.records import Record, digest, hold_out, write_records
from dataset.sets import canonical_name, draw_few_shot, open_dataset
from dataset.transforms import Transform
from forward_utils_cross_attention import (
    ClassText,
    PromptBank,
    encode,
    encode_stage1,
    predict,
    stage1_loss,
    stage2_loss,
)
from model.adapter_cross_attention import MODULES, STAGES, CrossAttentionCLIP
from utils import calibration, checkpoints
from utils.logs import CsvLog, log_to_file, progress
from utils.metrics import check_finite
from utils.plan import Position, Run, Settings, Stage, learning_rate_factor, shot_file, stage_title, vv_start

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.5, 0.999)
# Stage 2's learning rate is halved at these steps of the stage, as published.
MILESTONES = (16000, 32000)
# The losses of a stage's first steps are logged one by one: the zero start of a fresh module protects one step only.
FIRST_STEPS = 10
SAVE_SECONDS = 300
# Three numbers are fitted: more images of a kind would cost time and change little.
CALIBRATION_IMAGES = 200
# How PyTorch's CPU allocator puts it, on every system.
OUT_OF_MEMORY = "you tried to allocate"
LOSS_TERMS = [
    *(f"{term}_{level}" for level in range(1, 5) for term in ("focal", "dice_normal", "dice_abnormal")),
    "orthogonal",
    "classification",
]
COLUMNS = [
    *("kind", "loop", "stage", "epoch", "step", "lr", "lr_cross_attn", "loss", *LOSS_TERMS, "anchor_separation"),
    *(f"{measure}_{module}" for measure in ("grad_norm", "update") for module in MODULES),
    *(f"added_{module}" for module in MODULES if module.endswith("cross_attn")),
    *("emptied_masks", "seconds"),
]


class TrainingError(RuntimeError):
    """Training failed; the last saved state is intact."""


class TrainingStoppedError(TrainingError):
    """Training was stopped by a signal; its state is saved."""


@dataclass(frozen=True)
class TrainingData:
    """Records to train on and, with `--val_fraction`, those held out; the rest as in `dataset.sets.DataSet`.

    `cache` holds the images of both, None where every epoch reads the files.
    """

    folder: Path
    domain: str
    train: list[Record]
    held_out: list[Record]
    descriptions: dict[str, str]
    cache: ImageCache | None = None

    @property
    def summary(self) -> dict:
        """Tells whether a run that goes on has the same images in the same order."""
        counts = {"images": len(self.train), "held_out": len(self.held_out)}
        return counts | {"sha256": digest(self.train + self.held_out)}


def load_training_data(settings: Settings, data_root: Path, img_size: int, in_memory: bool = False) -> TrainingData:
    """Open, draw and check the images of a run, and read them where they shall be kept `in_memory`.

    Raises ValueError or FileNotFoundError.
    """
    data = open_dataset(settings.dataset, data_root, settings.domain, settings.class_name)
    records = data.records
    if settings.shot is not None:
        records = draw_few_shot(data, settings.shot, settings.seed, settings.class_name)
    train, held_out = hold_out(records, settings.val_fraction, settings.seed)
    if not train or (settings.val_fraction and not held_out):
        counts = f"{len(train)} images to train on and {len(held_out)} held out"
        raise ValueError(f"--val_fraction {settings.val_fraction}: leaves {counts}.")
    resized = Transform(img_size, augment=settings.augment)
    cache = cache_images(data.folder, records, resized) if in_memory else None
    if cache is None:  # filling it has opened every file
        check_files(data.folder, records)
    _report_maskless(train)
    return TrainingData(data.folder, data.domain, train, held_out, data.descriptions, cache)


def _report_maskless(records: list[Record]) -> None:
    """Say once what becomes of anomalous images without a mask."""
    anomalous = [record for record in records if record.label]
    maskless = sum(record.mask_path is None for record in anomalous)
    if maskless:
        logger.info("%d of %d anomalous images have no mask: no segmentation loss.", maskless, len(anomalous))
    if maskless == len(anomalous):
        logger.warning("No image here shows where a defect is, so the anomaly maps learn to find none.")


class Means:
    """Means of named values over the steps of an epoch, in Python floats, so that they can be saved and go on."""

    def __init__(self, totals: dict[str, list] | None = None):
        self.totals = totals or {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            total = self.totals.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def get(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.totals.items()}


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the running step ends and its state is saved; a second one stops at once."""

    def __enter__(self) -> "StopSignal":
        self.received: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trainer:
    """Trains `model` as `run` says. `on_stage_end(trainer, stage)` writes what a script wants to keep."""

    def __init__(
        self,
        model: CrossAttentionCLIP,
        data: TrainingData,
        run: Run,
        on_stage_end: Callable[["Trainer", Stage], None],
        num_workers: int = 0,
        tensorboard: Callable | None = None,
    ):
        self.model, self.data, self.on_stage_end, self.num_workers = model, data, on_stage_end, num_workers
        self.plan, self.settings, self.folder = run, run.settings, run.folder
        self.device = model.backbone.device
        self.bank = PromptBank(model.backbone, data.descriptions)
        self.vv_start = vv_start(run.settings, model.backbone)
        self.position = Position(run.stages[0].loop, run.stages[0].name)
        self.optimizer_states: dict[str, dict] = {}
        self.means = Means()
        self.metrics: dict[str, dict[str, float]] = {}
        self.log = CsvLog(run.folder / "log.csv", COLUMNS)
        self.board = None
        self._stop: StopSignal | None = None
        self._open_board = tensorboard

    # state

    def open_folder(self, new: bool) -> None:
        """Make the run's folder and log to it. A new run is named there before all else by its state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if new:
            self.save()
        log_to_file(self.folder / "train.log")
        if self._open_board:
            self.board = self._open_board(self.folder / "tensorboard")
        if new and self.settings.shot is not None:
            path = self.folder / shot_file(self.settings)
            write_records(path, self.data.train + self.data.held_out)

    def save(self) -> None:
        """Write all that exact continuation needs."""
        checkpoints.save(
            {
                **self.plan.header,
                "modules": checkpoints.states(self.model),
                "optimizers": self.optimizer_states,
                "position": tuple(self.position),
                "means": self.means.totals,
                "metrics": self.metrics,
                "rng": torch.get_rng_state(),
                "clip_sha256": self.model.backbone.sha256,
                "data": self.data.summary,
            },
            self.folder / checkpoints.STATE_FILE,
        )
        self._saved_at = time.monotonic()

    def restore(self, state: dict) -> None:
        """Take up a state of `save`."""
        for name, module in self.model.trainable().items():
            module.load_state_dict(state["modules"][name])
        self.optimizer_states = state["optimizers"]
        self.position = Position(*state["position"])
        self.means = Means(state["means"])
        self.metrics = state["metrics"]
        torch.set_rng_state(state["rng"])

    # the run

    def run(self) -> None:
        """Train what is left of the stages. Raises TrainingError; the last saved state is intact then."""
        now = self.position.order()
        self.log.open(keep=lambda row: _row_order(row) < now)
        self._saved_at = time.monotonic()
        with StopSignal() as self._stop:
            try:
                for stage in self.plan.stages:
                    if Position(stage.loop, stage.name).order()[:2] >= now[:2]:
                        self.run_stage(stage)
            except (ValueError, OSError) as error:  # of reading images and writing files
                raise TrainingError(f"{loader_message(error)} The last state is in {self.folder}.") from error
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise TrainingError(self._out_of_memory(stage, error)) from error
            except RuntimeError as error:
                if OUT_OF_MEMORY in str(error):
                    raise TrainingError(self._out_of_memory(stage, error)) from error
                raise

    def run_stage(self, stage: Stage) -> None:
        """Train one stage from the current position and hand it to `on_stage_end`."""
        model, name = self.model, stage.name
        begun = self.position != Position(stage.loop, name)
        model.set_stage(name)
        optimizer = self._make_optimizer(stage, begun)
        text = ClassText(model, self.bank, fixed=name == "image")
        dataset = self._images(self.data.train, name)
        sampler = SeededSampler(len(dataset), (self.settings.seed, stage.loop, STAGES.index(name)))
        loader = make_loader(dataset, stage.batch_size, self.num_workers, sampler)
        steps = self._steps_per_epoch(stage)
        title = f"loop {stage.loop}/{self.plan.last_loop} {stage.title}"
        done = self.position.epoch * steps + self.position.step
        with progress(total=stage.epochs * steps, initial=done, desc=title, unit="step") as bar:
            while self.position.epoch < stage.epochs:
                bar.set_description(f"{title} epoch {self.position.epoch + 1}/{stage.epochs}", refresh=False)
                sampler.set_epoch(self.position.epoch, skip=self.position.step * stage.batch_size)
                self.run_epoch(stage, loader, optimizer, text, steps, bar)
        self._report(stage)
        self.on_stage_end(self, stage)
        self.position = Position(stage.loop, "image") if name == "text" else Position(stage.loop + 1, "text")
        self.save()

    def run_epoch(
        self, stage: Stage, loader: DataLoader, optimizer: torch.optim.Adam, text: ClassText, steps: int, bar: tqdm
    ) -> None:
        """Train what is left of the current epoch, log it and save the state."""
        started = time.monotonic()
        epoch = self.position.epoch
        for batch in loader:
            step = self.position.step
            rates = self._set_learning_rates(optimizer, stage, epoch * steps + step)
            row = self.train_step(stage, batch, optimizer, text)
            self.means.add(row)
            if epoch == 0 and step < FIRST_STEPS:
                self._write_row("step", epoch, step, row | rates)
            self.position = self.position._replace(step=step + 1)
            bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{rates['lr']:.1e}", refresh=False)
            bar.update()
            self._save_if_due(stage.name, optimizer)
        self.optimizer_states[stage.name] = optimizer.state_dict()
        rates = self._set_learning_rates(optimizer, stage, (epoch + 1) * steps - 1)  # of the last step
        means = self.means.get() | {"emptied_masks": self.means.totals["emptied_masks"][0]}
        self.metrics[stage.name] = means
        self._write_row("epoch", epoch, None, means | rates | {"seconds": time.monotonic() - started})
        if self.data.held_out:
            held_out = self.validate(stage, text)
            self.metrics[stage.name] = means | {f"held_out_{name}": value for name, value in held_out.items()}
            self._write_row("held_out", epoch, None, held_out)
        self.means = Means()
        self.position = self.position._replace(epoch=epoch + 1, step=0)
        self.save()

    def train_step(self, stage: Stage, batch: dict, optimizer: torch.optim.Adam, text: ClassText) -> dict[str, float]:
        """One step of the optimiser; the values of its log row. The losses are those before the step."""
        modules = self.model.trainable(stage.name)
        added, hooks = {}, []
        for name, module in self.model.trainable().items():
            if name.endswith("cross_attn"):
                hooks.append(module.register_forward_hook(_measure_added(added, f"added_{name}")))
        optimizer.zero_grad(set_to_none=True)
        try:
            loss, terms = self.losses(stage, batch, text)
        finally:
            for hook in hooks:
                hook.remove()
        loss.backward()
        parameters = {name: list(module.parameters()) for name, module in modules.items()}
        values = {"loss": loss.detach(), **terms, **added}
        for name, tensors in parameters.items():
            gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
            values[f"grad_norm_{name}"] = nn.utils.get_total_norm(gradients)
        row = _to_floats(values) | {"emptied_masks": int(batch["emptied"].sum())}
        self._check_finite(row, batch)
        before = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in parameters.items()}
        optimizer.step()
        updates = {}
        for name, tensors in parameters.items():
            moved = [tensor.detach() - old for tensor, old in zip(tensors, before[name], strict=True)]
            updates[f"update_{name}"] = nn.utils.get_total_norm(moved)
        return row | _to_floats(updates)

    def losses(self, stage: Stage, batch: dict, text: ClassText) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the stage on a batch, and its terms without gradient."""
        settings, model = self.settings, self.model
        images, class_names = batch["image"].to(self.device, non_blocking=True), batch["class_name"]
        target = {key: batch[key].to(self.device, non_blocking=True) for key in ("mask", "label")}
        target["has_mask"] = batch["has_mask"]
        if stage.name == "text":
            across_batch = settings.vv_attention == "batch"
            patches, anchors = encode_stage1(
                model, images, class_names, text, stage.source, self.vv_start, across_batch, settings.precision
            )
            loss, terms = stage1_loss(
                patches, anchors, model.backbone.scale, target, settings.stage1_levels, settings.text_norm_weight
            )
        else:
            features, anchors = encode(model, images, class_names, text, settings.precision)
            loss, terms = stage2_loss(features, anchors, model.backbone.scale, target)
        # 0 where the normal and the abnormal anchor are one, 1 where they are orthogonal.
        terms["anchor_separation"] = 1 - (anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean()
        return loss, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def validate(self, stage: Stage, text: ClassText) -> dict[str, float]:
        """Means of the stage's losses on the held-out images, without augmentation."""
        means = Means()
        dataset = self._images(self.data.held_out, None)
        loader = make_loader(dataset, stage.batch_size, self.num_workers)
        for batch in progress(loader, desc="held out", leave=False):
            loss, terms = self.losses(stage, batch, text)
            means.add(_to_floats({"loss": loss, **terms}))
        return means.get()

    def calibrate(self) -> dict | None:
        """`Calibration` of the model as it is, as checkpoints hold it; on held-out images, else on those it trained on.

        At most CALIBRATION_IMAGES of each kind are drawn, by the seed. None, with a warning, where one kind is missing.
        """
        settings, model = self.settings, self.model
        held_out = bool(self.data.held_out) and not self._base_saw_held_out()
        records = _draw_kinds(self.data.held_out or self.data.train, CALIBRATION_IMAGES, settings.seed)
        text = ClassText(model, self.bank, fixed=True)
        loader = make_loader(self._images(records, None), settings.text_batch_size, self.num_workers)
        found: dict[str, list] = {"scores": [], "highest": [], "lowest": [], "labels": []}
        try:
            for batch in progress(loader, desc="calibration", leave=False):
                images = batch["image"].to(self.device, non_blocking=True)
                prediction = predict(model, images, batch["class_name"], text, self.data.domain, settings.precision)
                check_finite(prediction, batch["path"])
                found["scores"] += prediction.scores.tolist()
                found["highest"] += prediction.maps.amax(dim=(1, 2)).tolist()
                found["lowest"] += prediction.maps.amin(dim=(1, 2)).tolist()
                found["labels"] += batch["label"].tolist()
                if self._stop and self._stop.received:
                    raise TrainingStoppedError(f"Stopped by {self._stop.received}. The same command goes on from here.")
        except (ValueError, OSError) as error:
            raise TrainingError(f"{loader_message(error)} The last state is in {self.folder}.") from error
        map_range = (min(found.pop("lowest")), max(found["highest"]))
        fitted = calibration.fit(**found, map_range=map_range, held_out=held_out)
        if fitted is None:
            logger.warning("No calibration: the images are all of one kind, so a decision cannot be fitted.")
        return fitted and asdict(fitted)

    def _base_saw_held_out(self) -> bool:
        """Whether the base may have trained on the images that are held out now."""
        base = self.plan.base
        seen = {canonical_name(name) for name in base.get("datasets", [])}
        if not seen & {canonical_name(self.settings.dataset), "unknown"}:
            return False
        same = ("dataset", "seed", "val_fraction", "shot")
        own = base.get("training") or {}
        return any(own.get(name) != getattr(self.settings, name) for name in same)

    # parts

    def _images(self, records: list[Record], stage: str | None) -> AnomalyDataset:
        transform = Transform(self.model.backbone.img_size, stage, self.settings.augment)
        return AnomalyDataset(self.data.folder, records, transform, self.data.cache)

    def _make_optimizer(self, stage: Stage, begun: bool) -> torch.optim.Adam:
        modules = self.model.trainable(stage.name)
        groups = [{"params": list(module.parameters())} for module in modules.values()]
        optimizer = torch.optim.Adam(groups, lr=stage.lr, betas=ADAM_BETAS)
        carry = self.settings.optimizer_state == "carry" and stage.name in self.optimizer_states
        if begun or carry:
            optimizer.load_state_dict(self.optimizer_states[stage.name])
        return optimizer

    def _set_learning_rates(self, optimizer: torch.optim.Adam, stage: Stage, step: int) -> dict[str, float]:
        settings = self.settings
        factor = learning_rate_factor(
            settings.lr_schedule,
            step,
            stage.epochs * self._steps_per_epoch(stage),
            settings.warmup_steps,
            MILESTONES if stage.name == "image" else (),
        )
        rates = [rate * factor for rate in (stage.lr, stage.cross_attn_lr)]
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        return dict(zip(("lr", "lr_cross_attn"), rates[: len(optimizer.param_groups)], strict=False))

    def _steps_per_epoch(self, stage: Stage) -> int:
        return math.ceil(len(self.data.train) / stage.batch_size)

    def _check_finite(self, row: dict[str, float], batch: dict) -> None:
        for name, value in row.items():
            if not math.isfinite(value):
                files = "\n  ".join(batch["path"])
                raise TrainingError(
                    f"{name} is {value} at {self.position}; no step was made. The batch:\n  {files}\n"
                    f"The last good state is in {self.folder}. Look at these files, or lower the learning rate."
                )

    def _save_if_due(self, stage: str, optimizer: torch.optim.Adam) -> None:
        if self._stop.received or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.optimizer_states[stage] = optimizer.state_dict()
            self.save()
        if self._stop.received:
            raise TrainingStoppedError(
                f"Stopped by {self._stop.received} at {self.position}; the state is saved in {self.folder}. "
                "The same command goes on from here."
            )

    def _write_row(self, kind: str, epoch: int, step: int | None, values: dict) -> None:
        loop, stage = self.position[:2]
        head = {"kind": kind, "loop": loop, "stage": STAGES.index(stage) + 1, "epoch": epoch + 1, "step": step}
        self.log.write(head | {name: value for name, value in values.items() if name in COLUMNS})
        if self.board and kind != "step":
            earlier = (other.epochs for other in self.plan.stages if other.name == stage and other.loop < loop)
            for name, value in values.items():
                self.board.add_scalar(f"{stage_title(stage)}, {kind}/{name}", value, sum(earlier, epoch + 1))

    def _report(self, stage: Stage) -> None:
        last = self.metrics[stage.name]
        lines = [
            f"loop {stage.loop} {stage.title}, last epoch: loss {last['loss']:.4f}, "
            f"anchor separation {last['anchor_separation']:.4f}"
        ]
        if last["emptied_masks"]:
            masks = sum(record.mask_path is not None for record in self.data.train)
            lines.append(
                f"  {last['emptied_masks']:.0f} of {masks} masks left empty by resizing or augmentation: "
                "these images trained as if they had no defect to find"
            )
        for name in self.model.trainable():
            measures = [("gradient norm", "grad_norm"), ("update per step", "update"), ("added term / input", "added")]
            found = [f"{title} {last[f'{key}_{name}']:.3g}" for title, key in measures if f"{key}_{name}" in last]
            lines += [f"  {name}: {', '.join(found)}"] if found else []
        logger.info("\n".join(lines))

    def _out_of_memory(self, stage: Stage, error: BaseException) -> str:
        flag, size = f"--{stage.name}_batch_size", self.model.backbone.img_size
        return (
            f"Out of memory at {self.position}. Tried: {flag} {stage.batch_size}, --img_size {size}, "
            f"--precision {self.settings.precision} on {self.device}.\nThe last state is in {self.folder}. Start again "
            f"in a new --save_path with a smaller {flag}, or with --precision bf16.\n"
            f"({shorten(str(error), 160)})"
        )


def _draw_kinds(records: list[Record], each: int, seed: int) -> list[Record]:
    """At most `each` normal and as many anomalous records, drawn by `seed`, in their order."""
    rng = np.random.default_rng(seed)
    rows = []
    for label in (0, 1):
        kind = [row for row, record in enumerate(records) if record.label == label]
        rows += rng.permutation(kind)[:each].tolist()
    return [records[row] for row in sorted(rows)]


def _measure_added(found: dict[str, Tensor], name: str) -> Callable:
    """A forward hook that notes the norm of a cross-attention's added term relative to its input's."""

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].detach()
        found[name] = (output.detach() - x).float().norm() / x.float().norm()

    return hook


def _to_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """Python floats, brought from the device in one go."""
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def _row_order(row: dict[str, str]) -> tuple[int, int, float, float]:
    """Where a log row stands among positions: a step's before it, an epoch's at its end."""
    step = float(row["step"]) if row["step"] else math.inf
    return int(row["loop"]), int(row["stage"]) - 1, int(row["epoch"]) - 1, step
