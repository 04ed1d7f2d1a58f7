"""What is written of judged images: a table, maps, pictures and regions, all from one record of each verdict.

A record is a dict of plain types: COLUMNS, `width` and `height` of the image in px, and `regions`, see `Region`, from
`map_threshold` on; None where that is not known, or nobody asked. Known without PyTorch.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import replacing, write_text
from dataset.images import read_image
from dataset.words import on_one_line
from utils.files import unused_name, unused_names, write_csv
from utils.report.plots import Example, Panel, draw_examples
from utils.verdicts import Region, Verdict, caption, decision_word, scaled

Record = dict[str, Any]
TABLE, REGIONS = "predictions.csv", "regions.json"
COLUMNS = (
    *("image", "model", "single_score", "decision", "probability"),
    *("detection_score", "highest_map_value", "lowest_map_value", "map"),
)
# Longer side of the image in pictures, px.
PICTURE_SIZE = 600
# Columns of the printed table that the path of an image takes.
WIDEST = 80
# Of coordinates of regions, in px.
DECIMALS = 2


def record_of(image: Path, model: str, verdict: Verdict, map_file: str | None, with_regions: bool) -> Record:
    """What a verdict of a model on an image says, but for the map itself, which `map_file` may hold."""
    regions = verdict.regions if with_regions else None
    width, height = verdict.size
    return {
        "image": str(image),
        "model": model,
        "single_score": verdict.single_score,
        "decision": None if verdict.anomalous is None else decision_word(verdict.anomalous),
        "probability": verdict.probability,
        "detection_score": verdict.detection_score,
        "highest_map_value": verdict.highest,
        "lowest_map_value": float(verdict.map.min()),
        "map": map_file,
        "width": width,
        "height": height,
        "map_threshold": verdict.map_threshold,
        "regions": None if regions is None else [_rounded(region) for region in regions],
    }


def plain(record: Record) -> Record:
    """A record without the file of its map, for JSON."""
    return {name: value for name, value in record.items() if name != "map"}


def _rounded(region: Region) -> Record:
    outline = [[round(value, DECIMALS) for value in around] for around in region.outline]
    box = [round(value, DECIMALS) for value in region.box]
    return {"box": box, "area": round(region.area, DECIMALS), "peak": region.peak, "outline": outline}


def write_map(path: Path, values: np.ndarray) -> None:
    """A map as an array of NumPy."""
    content = io.BytesIO()  # NumPy's own errors of writing do not say that a disk is full
    np.save(content, values)
    with replacing(path) as file:
        file.write(content.getbuffer())


def write_table(folder: Path, records: Sequence[Record]) -> None:
    """predictions.csv."""
    write_csv(folder / TABLE, [{name: record[name] for name in COLUMNS} for record in records], COLUMNS)


def coco_files(models: Sequence[str]) -> dict[str, str]:
    """{model: the file of its regions in COCO's format}."""
    return {model: f"coco_{name}.json" for model, name in unused_names(models).items()}


def write_regions(folder: Path, records: Sequence[Record], models: Sequence[str]) -> None:
    """regions.json, a list of records, and of each model a file in COCO's format."""
    lines = ",\n".join(json.dumps(plain(record)) for record in records)
    write_text(folder / REGIONS, f"[\n{lines}\n]\n")
    for model, file in coco_files(models).items():
        write_text(folder / file, json.dumps(as_coco([record for record in records if record["model"] == model])))


def as_coco(records: Sequence[Record]) -> Record:
    """One model's records in COCO's format of detections (https://cocodataset.org/#format-data).

    The one category is an anomaly; the `score` of an annotation is the peak of its region, in map values.
    """
    images: list[Record] = []
    annotations: list[Record] = []
    for number, record in enumerate(records, start=1):
        images.append(
            {"id": number, "file_name": record["image"], "width": record["width"], "height": record["height"]}
        )
        for region in record["regions"]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": region["box"],
                    "area": region["area"],
                    "segmentation": region["outline"],
                    "score": region["peak"],
                }
            )
    return {"images": images, "categories": [{"id": 1, "name": "anomaly"}], "annotations": annotations}


def map_files(images: dict[Path, str], models: list[str]) -> dict[tuple[str, str], str]:
    """{(name of an image's results, model): file of the map}, no two of which are one file on any system."""
    taken: set[str] = set()
    return {
        (stem, model): f"{unused_name(f'{stem}_{model}', taken)}.npy" for stem in images.values() for model in models
    }


def check_folder(folder: Path, files: list[str], images: dict[Path, str]) -> None:
    """Raise ValueError where one of `files` would take the place of an image, or of anything but earlier results."""
    table, own = folder / TABLE, False
    if table.is_file():
        with open(table, encoding="utf-8", errors="replace") as lines:
            own = lines.readline().strip() == ",".join(COLUMNS)
    inputs = {(status.st_dev, status.st_ino) for status in (path.stat() for path in images)}
    for path in (folder / name for name in [TABLE, *files]):
        if path.exists() and (not own or (path.stat().st_dev, path.stat().st_ino) in inputs):
            raise ValueError(
                f"--save_path {folder}: {path.name} is there already, and is no result of predict.py that may be "
                "replaced. Choose another folder, a new one for instance."
            )


def draw(
    record_group: Sequence[Record],
    extremes: list[tuple[float, float]],
    scaled_by: str,
    folder: Path,
    stem: str,
    bits: int,
) -> None:
    """The picture of one image, from its record of each model: it, every model's map, and regions that are known."""
    path = Path(record_group[0]["image"])
    image = read_image(path, bits)
    image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    panels = []
    for record, ends in zip(record_group, extremes, strict=True):
        anomalous = None if record["decision"] is None else record["decision"] == decision_word(True)
        words = caption("single-image", record["single_score"], record["probability"], anomalous)
        outlines = [
            [value * image.width / record["width"] for value in around]
            for region in record["regions"] or ()
            for around in region["outline"]
        ]
        panels.append(Panel(scaled(np.load(folder / record["map"]), ends), words, outlines=outlines))
    example = Example(stem, np.asarray(image) / 255, None, panels)
    draw_examples([example], [record["model"] for record in record_group], scaled_by, path.name, folder / f"{stem}.png")


def table(records: Sequence[Record]) -> str:
    """Image, model, single-image score, probability and decision of each record."""
    names_of_images = [on_one_line(record["image"]) for record in records]
    names_of_images = [name if len(name) <= WIDEST else f"...{name[3 - WIDEST :]}" for name in names_of_images]
    width = max(map(len, names_of_images))
    names = max(len(record["model"]) for record in records)
    lines = [f"{'image':{width}}  {'model':{names}}  single-image score  probability  decision"]
    for record, image in zip(records, names_of_images, strict=True):
        p = "n/a" if record["probability"] is None else f"{record['probability']:.3f}"
        score, decision = f"{record['single_score']:.3f}", record["decision"] or decision_word(None)
        lines.append(f"{image:{width}}  {record['model']:{names}}  {score:>18}  {p:>11}  {decision}")
    return "\n".join(lines)
