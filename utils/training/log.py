"""What a training says and writes as it goes: log.csv, TensorBoard, and the end of each stage in words."""

import csv
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from dataset.files import naming
from model.adapter_cross_attention import MODULES, STAGES
from utils import processes
from utils.files import read_csv, write_csv
from utils.training.measures import Means
from utils.training.plan import Plan, Position, Stage, stage_title

logger = logging.getLogger(__name__)

# The losses of a stage's first steps are logged one by one: the zero start of a fresh module protects one step only.
FIRST_STEPS = 10
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


def tensorboard_writer() -> Callable:
    """TensorBoard's writer: called with a folder, it writes there. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard: the package is not installed (pip install tensorboard). log.csv is written without it."
        ) from error
    return SummaryWriter


class CsvLog:
    """A CSV file with fixed columns; each row is on disk when `write` returns. Numbers are written in full.

    Where another program locks the file (a spreadsheet on Windows), rows wait for the next `write` that succeeds.
    """

    def __init__(self, path: Path, columns: list[str]):
        self.path, self.columns = path, columns
        self.rows: list[dict[str, str]] = []  # that were there when it was opened
        self.waiting: list[dict] = []

    def open(self, keep: Callable[[dict[str, str]], bool]) -> None:
        """Start the file, or go on with one, keeping the rows that `keep` accepts.

        One that cannot be read, or was changed by others, is set aside first.
        """
        self.rows = []
        if self.path.exists() and not self.path.is_file():
            self._set_aside("no file")
        if self.path.exists():
            try:
                found = read_csv(self.path, self.columns[:5])
                self.rows = [{name: row.get(name, "") for name in self.columns} for row in found if keep(row)]
                if found and found[0].keys() - set(self.columns):
                    self._set_aside("it has columns of others", "and begun anew with the other ones")
            except ValueError as error:
                self._set_aside(f"damaged ({error})")
        write_csv(self.path, self.rows, self.columns, as_read=True)

    def _set_aside(self, reason: str, then: str = "and begun anew") -> None:
        aside = self.path.with_name(f"{self.path.stem}_damaged_{uuid4().hex[:6]}{self.path.suffix}")
        self.path.rename(aside)
        logger.warning("%s: %s; set aside as %s, %s.", self.path, reason, aside.name, then)

    def write(self, row: dict) -> None:
        """Append a row; columns that it lacks stay empty."""
        self.waiting.append(row)
        try:
            with naming(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                if not file.tell():  # removed, or emptied, meanwhile
                    writer.writeheader()
                writer.writerows(self.waiting)
        except PermissionError as error:
            logger.warning("%s cannot be written, its rows wait: %s", self.path, error)
        else:
            self.waiting.clear()


class TrainingLog:
    """Watches a training: takes in what each step measured, and writes the rows of `plan`'s log.

    `means` are those of the running epoch; `metrics` {stage: means of its last epoch}.
    """

    def __init__(self, plan: Plan, open_board: Callable | None = None):
        self.plan = plan
        self.csv = CsvLog(plan.folder / "log.csv", COLUMNS)
        self.means = Means()
        self.metrics: dict[str, dict[str, float]] = {}
        self._open_board = open_board
        self._board: Any = None

    def open(self, position: Position) -> None:
        """Begin, or go on from `position`, which later rows of an earlier start give way to."""
        if not processes.is_first():
            return
        now = position.order()
        self.csv.open(keep=lambda row: _row_order(row) < now)
        done = sum(stage.epochs for stage in self.plan.stages if Position(stage.loop, stage.name).order()[:2] < now[:2])
        lost = done + position.epoch - sum(row["kind"] == "epoch" for row in self.csv.rows)
        if lost > 0:
            logger.warning("%s: the rows of %d earlier epochs are lost; the training goes on.", self.csv.path, lost)
        if self._open_board:
            self._board = self._open_board(self.plan.folder / "tensorboard")

    def state(self) -> dict:
        """What exact continuation needs, for `restore`."""
        return {"means": self.means.totals, "metrics": self.metrics}

    def restore(self, state: dict) -> None:
        """Take up a state of an earlier start."""
        self.means, self.metrics = Means(state["means"]), state["metrics"]

    def step(self, position: Position, values: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Take in a step; the first of a stage have rows of their own."""
        self.means.add(values)
        if position.epoch == 0 and position.step < FIRST_STEPS:
            self._write("step", position, position.step, {**values, **rates})

    def epoch(self, position: Position, rates: Mapping[str, float], seconds: float, held_out: Mapping) -> None:
        """End an epoch, whose images held out lost `held_out` (empty where there are none)."""
        means = self.means.get() | {"emptied_masks": self.means.total("emptied_masks")}
        self._write("epoch", position, None, {**means, **rates, "seconds": seconds})
        if held_out:
            self._write("held_out", position, None, held_out)
        self.metrics[position.stage] = means | {f"held_out_{name}": value for name, value in held_out.items()}
        self.means = Means()

    def stage(self, stage: Stage, modules: Iterable[str], masks: int) -> None:
        """Say how a stage ended: its losses, what became of the `masks`, and how much its modules move."""
        last = self.metrics[stage.name]
        lines = [
            f"loop {stage.loop} {stage.title}, last epoch: loss {last['loss']:.4f}, "
            f"anchor separation {last['anchor_separation']:.4f}"
        ]
        if last["emptied_masks"]:
            lines.append(
                f"  {last['emptied_masks']:.0f} of {masks} masks left empty by resizing or augmentation: "
                "these images trained as if they had no defect to find"
            )
        for name in modules:
            measures = [("gradient norm", "grad_norm"), ("update per step", "update"), ("added term / input", "added")]
            found = [f"{title} {last[f'{key}_{name}']:.3g}" for title, key in measures if f"{key}_{name}" in last]
            lines += [f"  {name}: {', '.join(found)}"] if found else []
        logger.info("\n".join(lines))

    def _write(self, kind: str, position: Position, step: int | None, values: Mapping[str, float]) -> None:
        if not processes.is_first():
            return
        loop, stage, epoch, _ = position
        head = {"kind": kind, "loop": loop, "stage": STAGES.index(stage) + 1, "epoch": epoch + 1, "step": step}
        self.csv.write(head | {name: value for name, value in values.items() if name in COLUMNS})
        if self._board and kind != "step":
            earlier = (other.epochs for other in self.plan.stages if other.name == stage and other.loop < loop)
            for name, value in values.items():
                self._board.add_scalar(f"{stage_title(stage)}, {kind}/{name}", value, sum(earlier, epoch + 1))


def _row_order(row: dict[str, str]) -> tuple[int, int, float, float]:
    """Where a log row stands among positions: a step's before it, an epoch's at its end."""
    step = float(row["step"]) if row["step"] else math.inf
    return int(row["loop"]), int(row["stage"]) - 1, int(row["epoch"]) - 1, step
