"""Comparisons as people and other programs read them: text, CSV, JSON and LaTeX."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dataset.constants import DATA_SETS
from dataset.files import write_text
from dataset.sets import DataSet, count_images
from dataset.words import printable
from utils.files import write_csv
from utils.testing.bootstrap import CONFIDENCE, MIN_IMAGES, enough
from utils.testing.comparison import Comparison
from utils.testing.metrics import COLUMNS, METRICS, Sample
from utils.testing.results import AVERAGE, Results, Row, written_name

# What means something to LaTeX, and how it is written.
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "\\textquotedbl{}",
}

LEGEND = (
    "image: the published score, scaled by the extremes of a class; alone: a score that needs no other image; "
    "decision: by the calibration in the checkpoint."
)


def percent(value: float, signed: bool = False) -> str:
    """A metric in percent, or n/a."""
    if math.isnan(value):
        return "n/a"
    return f"{round(100 * value, 2) + 0.0:{'+' if signed else ''}.2f}"  # + 0.0: never -0.00


def block_title(data: DataSet, class_name: str) -> str:
    """What stands above the rows of a class or of the average."""
    if class_name == AVERAGE and len(data.descriptions) > 1:
        return f"average of {len(data.descriptions)} classes"
    if class_name == AVERAGE:
        (class_name,) = data.descriptions
    normal, anomalous = count_images(data.of_class(class_name))[class_name]
    return f"{class_name}: {normal} normal and {anomalous} anomalous images"


def text_table(comparison: Comparison, average_only: bool = False) -> str:
    """The comparison in percent, class by class or of the average alone; intervals beneath differences of the average.

    A single class has no other average than itself.
    """
    classes = [] if average_only or len(comparison.classes) == 1 else comparison.classes
    blocks = {name: comparison.rows[name] for name in [*classes, AVERAGE]}
    width = 6 + max(len(row.name) for rows in blocks.values() for row in rows)
    groups = [group for group, _ in COLUMNS.values()]
    heads = ["" if group == before else group for before, group in zip(["", *groups], groups, strict=False)]
    lines = [_line("", heads, width), _line("", [title for _, title in COLUMNS.values()], width)]
    for name, rows in blocks.items():
        lines.append(block_title(comparison.data, name))
        for row in rows:
            lines += _text_rows(row, width, with_interval=name == AVERAGE)
    if any("*" in line for line in lines):
        lines.append(
            f"*: the {CONFIDENCE:.0%} interval over the images of the test leaves out 0; of seeds it says nothing."
        )
    return "\n".join(lines)


def _line(name: str, cells: list[str], width: int) -> str:
    """A name, and cells as wide as the widest title of a column."""
    cell_width = max(9, *(1 + len(title) for _, title in COLUMNS.values()))
    return f"{name:{width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells)


def _text_rows(row: Row, width: int, with_interval: bool) -> list[str]:
    indent = "    " if row.less else "  "
    cells = [f"{percent(row.values[m], bool(row.less))}{'*' if row.is_sure(m) else ''}" for m in COLUMNS]
    lines = [_line(indent + row.name, cells, width)]
    if row.spread:
        lines.append(_line(f"{indent}  ± over seeds", [percent(row.spread[m]) for m in COLUMNS], width))
    if with_interval and row.less and any(not math.isnan(row.low[m]) for m in row.low):
        bounds = (f"{CONFIDENCE:.0%} from", row.low), ("to", row.high)
        for title, side in bounds:
            lines.append(_line(f"{indent}  {title:>9}", [percent(side[m], True) for m in COLUMNS], width))
    return lines


def notes(comparison: Comparison) -> list[str]:
    """What is to be said beneath the tables of a comparison."""
    found, results = [LEGEND], comparison.results
    samples = comparison.subject.samples
    small = [name for name in comparison.classes if not enough(samples[name].labels)]
    if small:
        found.append(f"No intervals where there are fewer than {MIN_IMAGES} images of a kind: {', '.join(small)}.")
    for metric, classes in comparison.left_out.items():
        found.append(f"{metric.replace('_', ' ')} is n/a in {', '.join(classes)}, so the average leaves them out.")
    if any("base" in result.references for result in results):
        if not any("control" in result.references for result in results):
            found.append("Less its base may be the work of longer training: --control RUN tells, see README.")
        found.append("Of 100 differences that are nothing, about 5 have an interval that leaves out 0.")
    if normal := comparison.bench.normal_images:
        count = len(next(iter(normal.values())))
        found.append(
            f"Not zero-shot: text cross-attention in the joint space sees {count} known good images of each class. "
            "Bases do not, and calibrations were fitted without."
        )
    if comparison.bench.batching.reduced_jpeg:
        found.append("Large JPEG files were decoded at reduced size (--reduced_jpeg).")
    data, known = comparison.data, DATA_SETS.get(comparison.data.source)
    if known and known.reported and not data.reported:
        found.append(f"AA-CLIP's reported numbers are left out: these are not all images of {data.source}, or others.")
    fitted = {result.name: result.contender.checkpoint.calibration for result in results}
    missing = [name for name, calibration in fitted.items() if calibration is None]
    if missing:
        found.append(f"No decision: {', '.join(missing)}: files without a calibration.")
    trained_on = [name for name, calibration in fitted.items() if calibration and not calibration.held_out]
    if trained_on:
        found.append(
            f"Calibrated on images that were trained on, so decisions may be worse here: {', '.join(trained_on)}."
        )
    return found


def write_results(results: Results) -> list[Path]:
    """Write a model's results by class, and by image, beside its checkpoint.

    <loop>_<data set>.csv and <loop>_<data set>_images.csv; in a base's folder, base_...
    """
    stem = results.contender.stem
    data = results.bench.data
    name = f"{stem.name}_{data.name}"
    images = [row for class_name, sample in results.samples.items() for row in _image_rows(class_name, sample, data)]
    stem.parent.mkdir(parents=True, exist_ok=True)
    return [
        write_csv(stem.with_name(f"{name}.csv"), _class_rows(results)),
        write_csv(stem.with_name(f"{name}_images.csv"), images),
    ]


def _class_rows(results: Results) -> list[dict]:
    """A row of the CSV for each class and for the average."""
    contender, data = results.contender, results.bench.data
    counts = count_images(data.records)
    normal, anomalous = map(sum, zip(*counts.values(), strict=True))
    rows = []
    for class_name in results.values:
        row: dict[str, object] = {"checkpoint": contender.checkpoint.path.as_posix()}
        row |= {"dataset": data.name, "class": written_name(class_name)}
        row |= dict(zip(("normal", "anomalous"), counts.get(class_name, (normal, anomalous)), strict=True))
        row |= _cells(results.rows[class_name])
        for role, other in results.references.items():
            row |= {f"{metric}_{role}": value for metric, value in other.values[class_name].items()}
            row |= _cells(results.differences[role][class_name], f"_less_{role}")
        row |= {"trained_on_this_data_set": contender.was_trained_on(data)}
        row |= {"img_size": contender.model.config.img_size, "precision": results.bench.batching.precision}
        rows.append(row | {"reduced_jpeg": results.bench.batching.reduced_jpeg})
    return rows


def _cells(row: Row, ending: str = "") -> dict[str, float]:
    """The values of a row and the ends of its interval, by the names of their columns."""
    parts = (("", row.values), ("_low", row.low), ("_high", row.high))
    return {f"{metric}{ending}{side}": values[metric] for metric in METRICS for side, values in parts}


def _image_rows(class_name: str, sample: Sample, data: DataSet) -> list[dict]:
    """A row of the CSV by image for each image of a class."""
    undefined = np.full(len(sample.labels), np.nan)
    columns = {
        "image": [Path(path).relative_to(data.folder).as_posix() for path in sample.paths],
        "label": sample.labels.tolist(),
        "published_score": sample.published_scores.tolist(),
        "single_score": sample.single_scores.tolist(),
        "probability": (undefined if sample.probabilities is None else sample.probabilities).tolist(),
        "decision": (undefined if sample.decisions is None else sample.decisions).tolist(),
        "pixel_ap": sample.pixel_ap.tolist(),
    }
    return [
        {"class": written_name(class_name), **dict(zip(columns, cells, strict=True))}
        for cells in zip(*columns.values(), strict=True)
    ]


def write_json(comparison: Comparison, path: Path) -> Path:
    """Write everything of a comparison: models, notes, and the rows of all classes and of the average."""
    data = comparison.data
    content = {
        "dataset": data.name,
        "images": len(data.records),
        "interval": {"confidence": CONFIDENCE, "resamples": comparison.resamples},
        "models": [_describe(result) for result in comparison.results],
        "rows": {written_name(name): [_plain(row) for row in rows] for name, rows in comparison.rows.items()},
        "notes": notes(comparison),
    }
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def _describe(result: Results) -> dict:
    """Which model a result is of."""
    contender, checkpoint = result.contender, result.contender.checkpoint
    return {
        "name": contender.name,
        "checkpoint": checkpoint.path.as_posix(),
        "loop": checkpoint.loop,
        "seed": checkpoint.seed,
        "compared_with": {role: other.name for role, other in contender.references.items()},
        "trained_on_this_data_set": contender.was_trained_on(result.bench.data),
        "clip_sha256": contender.model.backbone.sha256,
    }


def _plain(row: Row) -> dict:
    """A row as plain types, without empty parts; undefined values are None."""
    return {
        part: {k: None if np.isnan(v) else v for k, v in content.items()} if isinstance(content, dict) else content
        for part, content in asdict(row).items()
        if content
    }


def write_latex(comparison: Comparison, path: Path) -> Path:
    """Write the average's rows as a tabular for booktabs, in percent; intervals and deviations small beside values."""
    groups = [group for group, _ in COLUMNS.values()]
    spans = [f"\\multicolumn{{{groups.count(group)}}}{{c}}{{{latex_text(group)}}}" for group in dict.fromkeys(groups)]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}",
        "\\toprule",
        " & ".join(["", *spans]) + " \\\\",
        " & ".join(["", *(latex_text(title) for _, title in COLUMNS.values())]) + " \\\\",
        "\\midrule",
    ]
    for row in comparison.rows[AVERAGE]:
        indent = "\\quad " if row.less else ""
        cells = [indent + latex_text(row.name), *(latex_cell(row, name) for name in COLUMNS)]
        lines.append(" & ".join(cells) + " \\\\")
    return write_text(path, "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""]))


def latex_cell(row: Row, metric: str) -> str:
    """A value in percent for LaTeX, with its interval or deviation."""
    value = percent(row.values[metric], bool(row.less))
    if value == "n/a":
        return value
    small = ""
    if row.spread:
        small = f"\\pm {percent(row.spread[metric])}"
    elif row.less and not math.isnan(row.low[metric]):
        small = f"[{percent(row.low[metric], True)}, {percent(row.high[metric], True)}]"
    return f"${value}$" + (f" {{\\scriptsize ${small}$}}" if small else "")


def latex_text(text: str) -> str:
    """Plain text for LaTeX."""
    guard = "{}" if text.startswith(("*", "[")) else ""  # which behind the end of a row would be part of that
    return guard + "".join(LATEX.get(character, character) for character in printable(text))
