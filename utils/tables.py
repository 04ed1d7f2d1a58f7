"""Comparisons as people and other programs read them: text, CSV, JSON and LaTeX."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np

from dataset.sets import DataSet, count_images
from utils.bootstrap import CONFIDENCE, MIN_IMAGES, enough
from utils.comparison import Row, as_json, comparison, difference, left_out, result
from utils.evaluation import AVERAGE, Tested
from utils.metrics import COLUMNS, METRICS

LEGEND = (
    "image: the published score, scaled by the extremes of a class; alone: a score that needs no other image; "
    "decision: by the calibration in the checkpoint."
)


def percent(value: float, signed: bool = False) -> str:
    """A metric in percent, or n/a."""
    if math.isnan(value):
        return "n/a"
    return f"{round(100 * value, 2) + 0.0:{'+' if signed else ''}.2f}"  # + 0.0: never -0.00


def titles(data: DataSet, class_name: str) -> str:
    """What stands above the rows of a class or of the average."""
    if class_name == AVERAGE and len(data.descriptions) > 1:
        return f"average of {len(data.descriptions)} classes"
    if class_name == AVERAGE:
        (class_name,) = data.descriptions
    normal, anomalous = count_images(data.of_class(class_name))[class_name]
    return f"{class_name}: {normal} normal and {anomalous} anomalous images"


def shown_classes(tested: list[Tested]) -> list[str]:
    """The classes of a comparison and AVERAGE, which stands for a single class too."""
    return [*(tested[0].classes if len(tested[0].classes) > 1 else []), AVERAGE]


def text_table(tested: list[Tested], data: DataSet, classes: list[str]) -> str:
    """The comparison, class by class, in percent; intervals beneath the differences of the last of `classes`."""
    blocks = {name: comparison(tested, data, name) for name in classes}
    width = 6 + max(len(row.name) for rows in blocks.values() for row in rows)
    groups = [group for group, _ in COLUMNS.values()]
    heads = ["" if group == before else group for before, group in zip(["", *groups], groups, strict=False)]
    lines = [f"{'':{width}}" + "".join(f"{head:>9}" for head in heads)]
    lines.append(f"{'':{width}}" + "".join(f"{title:>9}" for _, title in COLUMNS.values()))
    for name, rows in blocks.items():
        lines.append(titles(data, name))
        for row in rows:
            lines += _text_rows(row, width, name == classes[-1])
    if any("*" in line for line in lines):
        lines.append(
            f"*: the {CONFIDENCE:.0%} interval over the images of the test leaves out 0; of seeds it says nothing."
        )
    return "\n".join(lines)


def _text_rows(row: Row, width: int, with_interval: bool) -> list[str]:
    def line(name: str, cells: list[str]) -> str:
        return f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells)

    indent = "    " if row.less else "  "
    cells = [f"{percent(row.values[m], bool(row.less))}{'*' if row.is_sure(m) else ''}" for m in COLUMNS]
    lines = [line(indent + row.name, cells)]
    if row.spread:
        lines.append(line(f"{indent}  ± over seeds", [percent(row.spread[m]) for m in COLUMNS]))
    if with_interval and row.less and any(not math.isnan(row.low[m]) for m in row.low):
        bounds = (f"{CONFIDENCE:.0%} from", row.low), ("to", row.high)
        lines += [line(f"{indent}  {title:>9}", [percent(side[m], True) for m in COLUMNS]) for title, side in bounds]
    return lines


def notes(tested: list[Tested], data: DataSet) -> list[str]:
    """What is to be said beneath the tables of a comparison."""
    found = [LEGEND]
    small = [name for name in tested[0].classes if not enough(tested[0].samples[name].labels)]
    if small:
        found.append(f"No intervals where there are fewer than {MIN_IMAGES} images of a kind: {', '.join(small)}.")
    for metric, classes in left_out(tested).items():
        found.append(f"{metric.replace('_', ' ')} is n/a in {', '.join(classes)}, so the average leaves them out.")
    if any("base" in each.references for each in tested):
        if not any("control" in each.references for each in tested):
            found.append("Less its base may be the work of longer training: --control RUN tells, see README.")
        found.append("Of 100 differences that are nothing, about 5 have an interval that leaves out 0.")
    missing = [each.name for each in tested if each.checkpoint.calibration is None]
    if missing:
        found.append(f"No decision: {', '.join(missing)}: files without a calibration.")
    fitted = [each.name for each in tested if each.checkpoint.calibration and not each.checkpoint.calibration.held_out]
    if fitted:
        found.append(f"Calibrated on images that were trained on, so decisions may be worse here: {', '.join(fitted)}.")
    return found


def stem_of(each: Tested) -> Path:
    """Where a model's own files begin: <run>/loop_<k>, or <folder of the base>/base."""
    path = each.checkpoint.path
    return path.with_suffix("") if each.checkpoint.is_loop_file else path / "base"


def _write_csv(path: Path, rows: list[dict]) -> Path:
    """Undefined values stay empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows
        )
    return path


def write_results(each: Tested, data: DataSet, precision: str) -> list[Path]:
    """Write a model's results by class, and by image, beside its checkpoint.

    <loop>_<data set>.csv and <loop>_<data set>_images.csv; in a base's folder, base_...
    """
    stem = stem_of(each)
    rows, images = [], []
    counts = count_images(data.records) | {
        AVERAGE: tuple(map(sum, zip(*count_images(data.records).values(), strict=True)))
    }
    for class_name in each.results:
        normal, anomalous = counts[class_name]
        row = {"checkpoint": each.checkpoint.path.as_posix(), "dataset": data.name, "class": class_name}
        row |= {"normal": normal, "anomalous": anomalous}
        row |= _csv_cells(result(each, class_name))
        for title, other in each.references.items():
            row |= {f"{name}_{title}": value for name, value in other.results[class_name].items()}
            row |= _csv_cells(difference(each, title, class_name), f"_less_{title}")
        row |= {"trained_on_this_data_set": each.was_trained_on(data)}
        rows.append(row | {"img_size": each.model.config.img_size, "precision": precision})
    for class_name, sample in each.samples.items():
        undefined = np.full(len(sample.labels), np.nan)
        columns = {
            "image": [Path(path).relative_to(data.folder).as_posix() for path in sample.paths],
            "label": sample.labels.tolist(),
            "published_score": sample.scores.tolist(),
            "single_score": sample.single.tolist(),
            "probability": (undefined if sample.probabilities is None else sample.probabilities).tolist(),
            "decision": (undefined if sample.decisions is None else sample.decisions).tolist(),
            "pixel_ap": sample.pixel_ap.tolist(),
        }
        images += [
            {"class": class_name} | dict(zip(columns, cells, strict=True))
            for cells in zip(*columns.values(), strict=True)
        ]
    name = f"{stem.name}_{data.name}"
    return [
        _write_csv(stem.with_name(f"{name}.csv"), rows),
        _write_csv(stem.with_name(f"{name}_images.csv"), images),
    ]


def _csv_cells(row: Row, ending: str = "") -> dict[str, float]:
    parts = (("", row.values), ("_low", row.low), ("_high", row.high))
    return {f"{name}{ending}{side}": values[name] for name in METRICS for side, values in parts}


def write_json(tested: list[Tested], data: DataSet, path: Path, resamples: int) -> Path:
    """Write everything of a comparison: models, notes, and the rows of all classes and of the average."""
    content = {
        "dataset": data.name,
        "images": len(data.records),
        "interval": {"confidence": CONFIDENCE, "resamples": resamples},
        "models": [
            {
                "name": each.name,
                "checkpoint": each.checkpoint.path.as_posix(),
                "loop": each.checkpoint.loop,
                "seed": each.seed,
                "compared_with": {title: other.name for title, other in each.references.items()},
                "trained_on_this_data_set": each.was_trained_on(data),
                "clip_sha256": each.model.backbone.sha256,
            }
            for each in tested
        ],
        "rows": {name: as_json(comparison(tested, data, name)) for name in tested[0].results},
        "notes": notes(tested, data),
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_latex(tested: list[Tested], data: DataSet, path: Path) -> Path:
    """Write the average's rows as a tabular for booktabs, in percent; intervals and deviations small beside values."""
    groups = [group for group, _ in COLUMNS.values()]
    spans = [f"\\multicolumn{{{groups.count(group)}}}{{c}}{{{group}}}" for group in dict.fromkeys(groups)]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}",
        "\\toprule",
        " & ".join(["", *spans]) + " \\\\",
        " & ".join(["", *(title for _, title in COLUMNS.values())]) + " \\\\",
        "\\midrule",
    ]
    for row in comparison(tested, data, AVERAGE):
        indent = "\\quad " if row.less else ""
        lines.append(" & ".join([indent + _escape(row.name), *(_latex_cell(row, name) for name in COLUMNS)]) + " \\\\")
    path.write_text("\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""]), encoding="utf-8")
    return path


def _latex_cell(row: Row, metric: str) -> str:
    value = percent(row.values[metric], bool(row.less))
    if value == "n/a":
        return value
    small = ""
    if row.spread:
        small = f"\\pm {percent(row.spread[metric])}"
    elif row.less and not math.isnan(row.low[metric]):
        small = f"[{percent(row.low[metric], True)}, {percent(row.high[metric], True)}]"
    return f"${value}$" + (f" {{\\scriptsize ${small}$}}" if small else "")


def _escape(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)
