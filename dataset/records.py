"""Records of a data set: read from AA-CLIP's JSON lines, checked, divided and written.

A line is {"image_path", "label", "class_name", "mask_path"}, with paths relative to the data set's folder.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Record:
    """One image: `label` 0 normal or 1 anomalous; `mask_path` None for normal and for maskless images."""

    image_path: str
    label: int
    class_name: str
    mask_path: str | None = None


def read_records(metadata: Path, folder: Path) -> list[Record]:
    """Read and check a JSON lines file; every image and mask it names must exist inside `folder`."""
    records = []
    with open(metadata, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{metadata}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error}).") from error
            if text:
                records.append(_parse(text, where))
                _check_files(records[-1], folder, where)
    if not records:
        raise ValueError(f"{metadata}: no records; expected one JSON object a line.")
    return records


def _parse(line: str, where: str) -> Record:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {line.strip()[:80]}") from error
    required = ("image_path", "label", "class_name")
    missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ValueError(f"{where}: expected an object with {', '.join(required)}; {missing[0]} is missing.")
    if entry["label"] not in (0, 1):
        raise ValueError(f"{where}: label is {entry['label']!r}, expected 0 (normal) or 1 (anomalous).")
    label = int(entry["label"])
    for key in ("image_path", "class_name", "mask_path"):
        if not isinstance(entry.get(key) or "", str):
            raise ValueError(f"{where}: {key} is {entry[key]!r}, expected a text.")
    # Some published lists give normal images a mask path that does not exist; it would not be read.
    mask_path = (entry.get("mask_path") or None) if label else None
    return Record(entry["image_path"], label, entry["class_name"], mask_path)


def _check_files(record: Record, folder: Path, where: str) -> None:
    for kind, relative in (("image", record.image_path), ("mask", record.mask_path)):
        if relative is None:
            continue
        if os.path.isabs(relative) or os.path.normpath(relative).startswith(".."):
            raise ValueError(f"{where}: the {kind} '{relative}' lies outside the data set's folder.")
        if not os.path.isfile(folder / relative):
            raise FileNotFoundError(f"{where}: the {kind} '{folder / relative}' does not exist.")


def write_records(path: Path, records: list[Record]) -> None:
    """Write `records` as JSON lines."""
    lines = (json.dumps({k: v for k, v in asdict(record).items() if v is not None}) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def few_shot(records: list[Record], shot: int, seed: int) -> list[Record]:
    """`shot` images per class (an even number), half normal and half anomalous, drawn with `seed`.

    Raises ValueError where a class has too few of a kind.
    """
    chosen = []
    for (class_name, label), group in _groups(records).items():
        if len(group) < shot // 2:
            kind = "anomalous" if label else "normal"
            raise ValueError(f"--shot {shot}: class '{class_name}' has {len(group)} {kind} images, needed {shot // 2}.")
        chosen += _draw(group, shot // 2, seed)
    return chosen


def hold_out(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Divide into a training part and a held-out `fraction` of each class and label, drawn with `seed`."""
    held = set()
    for group in _groups(records).values():
        held.update(_draw(group, round(len(group) * fraction), seed))
    return [r for r in records if r not in held], [r for r in records if r in held]


def _groups(records: list[Record]) -> dict[tuple[str, int], list[Record]]:
    """{(class, label): records}; both labels of every class are there, so that an absent kind is seen."""
    groups = {
        (class_name, label): [] for class_name in dict.fromkeys(r.class_name for r in records) for label in (0, 1)
    }
    for record in records:
        groups[record.class_name, record.label].append(record)
    return groups


def _draw(group: list[Record], count: int, seed: int) -> list[Record]:
    order = np.random.default_rng(seed).permutation(len(group))[:count]
    return [group[index] for index in sorted(order)]
