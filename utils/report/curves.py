"""Curves: metrics over the loops of runs, and the course of a training."""

import logging
import math
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.files import read_csv
from utils.report.plots import save_figure
from utils.testing.comparison import Comparison
from utils.testing.metrics import COLUMNS
from utils.testing.results import AVERAGE, Row

logger = logging.getLogger(__name__)


def loops_of_runs(comparison: Comparison) -> dict[str, dict[int, tuple[Row, Row | None]]]:
    """{run: {loop: (average, difference from the base)}} of runs with two tested loops or more; loop 0 is the base."""
    runs: dict[str, dict[int, tuple[Row, Row | None]]] = {}
    for result in comparison.results:
        if "base" in result.references:
            base, checkpoint = result.references["base"], result.contender.checkpoint
            loops = runs.setdefault(str(checkpoint.folder), {0: (base.rows[AVERAGE], None)})
            loops[checkpoint.loop] = (result.rows[AVERAGE], result.differences["base"][AVERAGE])
    return {folder: dict(sorted(loops.items())) for folder, loops in runs.items() if len(loops) > 2}


def draw_metrics_over_loops(runs: dict[str, dict[int, tuple[Row, Row | None]]], title: str, path: Path) -> None:
    """A small plot per metric: every run's average, loop by loop; the base is loop 0 and a dashed line.

    `runs`: {run: {loop: (its row, its difference from the base)}}; bars are the intervals of the differences.
    """
    shown = [
        metric
        for metric in COLUMNS
        if any(not math.isnan(row.values[metric]) for loops in runs.values() for row, _ in loops.values())
    ]
    columns = math.ceil(len(shown) / 2)
    figure = Figure(figsize=(2.4 * columns, 5), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False).ravel()
    for axis, metric in zip(axes, shown, strict=False):
        for number, (run, loops) in enumerate(runs.items()):
            values = [100 * row.values[metric] for row, _ in loops.values()]
            axis.plot(list(loops), values, marker="o", markersize=3, color=f"C{number}", label=run)
            axis.axhline(values[0], color=f"C{number}", linestyle="--", linewidth=0.8)
            for loop, (row, moved) in loops.items():
                if moved and not math.isnan(moved.low[metric]):
                    base = row.values[metric] - moved.values[metric]
                    ends = [100 * (base + side[metric]) for side in (moved.low, moved.high)]
                    axis.plot([loop, loop], ends, color=f"C{number}", linewidth=3, alpha=0.25)
        axis.set_title(" ".join(COLUMNS[metric]), fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=7)
        axis.ticklabel_format(useOffset=False)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    for axis in axes[columns:]:
        axis.set_xlabel("loop (0: the base)", fontsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7, ncols=3)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def draw_training(log: Path, path: Path) -> bool:
    """What log.csv has of each epoch, stage by stage: loss terms, anchor separation, gradients, added terms.

    Returns False, drawing nothing, where no epoch is finished, and, with a warning, where the file is damaged.
    """
    try:
        rows = [
            row for row in read_csv(log, ("kind", "loop", "stage", "epoch")) if row["kind"] in ("epoch", "held_out")
        ]
        if rows:
            save_figure(_training_figure(rows, log.parent.name), path)
    except ValueError as error:
        logger.warning("No curves of the training: %s is damaged (%s).", log, error)
        return False
    return bool(rows)


def _training_figure(rows: list[dict[str, str]], run: str) -> Figure:
    """Curves of the rows of epochs. Raises ValueError for a cell that is no number."""
    subjects = {
        "loss": ("loss",),
        "loss terms": ("focal_", "dice_", "orthogonal", "classification"),
        "anchor separation": ("anchor_separation",),
        "gradient norm": ("grad_norm_",),
        "update per step": ("update_",),
        "added term / input": ("added_",),
    }
    figure = Figure(figsize=(20, 6))
    # Given, not found by a layout engine, which draws all of it twice: a training draws it after each loop.
    figure.subplots_adjust(left=0.03, right=0.94, bottom=0.07, top=0.9, wspace=0.75, hspace=0.3)
    grid = figure.subplots(2, len(subjects))
    for number, line in enumerate(grid, start=1):
        stage = [row for row in rows if row["stage"] == str(number)]
        for axis, (subject, starts) in zip(line, subjects.items(), strict=True):
            _draw_columns(axis, stage, [name for name in rows[0] if name.startswith(starts)])
            axis.set_title(f"Stage {number}: {subject}", fontsize=8)
    figure.suptitle(f"{run}: means over epochs (dashed: held out; grey: a new loop begins)", fontsize=9)
    return figure


def _draw_columns(axis: Axes, rows: list[dict[str, str]], names: list[str]) -> None:
    """Columns of a log over epochs, all loops after one another."""
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        places.setdefault((row["loop"], row["epoch"]), len(places) + 1)
    for kind, line in (("epoch", "-"), ("held_out", "--")):
        for number, name in enumerate(names):
            points = [
                (places[row["loop"], row["epoch"]], float(row[name]))
                for row in rows
                if row["kind"] == kind and row[name]
            ]
            if points:
                style: dict[str, Any] = {"marker": ".", "markersize": 3} if kind == "epoch" else {}
                label = name.removeprefix("grad_norm_").removeprefix("update_").removeprefix("added_")
                colour = colormaps["tab20"](number % 20)
                axis.plot(*zip(*points, strict=True), line, color=colour, label=label if line == "-" else None, **style)
    for (loop, epoch), place in places.items():
        if loop != "1" and epoch == "1":
            axis.axvline(place - 0.5, color="grey", linewidth=0.5)
    axis.set_xlabel("epoch", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.yaxis.get_offset_text().set_fontsize(5)
    axis.yaxis.get_offset_text().set_x(-0.2)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) > 1 and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=5, loc="upper left", bbox_to_anchor=(1, 1))
