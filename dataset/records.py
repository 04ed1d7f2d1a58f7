"""Records of a data set: found under the data root, read from AA-CLIP's JSON lines, checked, and divided.

A line is {"image_path", "label", "class_name", "mask_path"}, with paths relative to the data set's folder.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dataset.constants import BLUR, DATA_SETS, describe_class

logger = logging.getLogger(__name__)

METADATA = Path(__file__).parent / "metadata"


@dataclass(frozen=True)
class Record:
    """One image: `label` 0 normal or 1 anomalous; `mask_path` None for normal and for maskless images."""

    image_path: str
    label: int
    class_name: str
    mask_path: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set on disk. `descriptions`: {class: its name in the prompts}, in the order of the classes."""

    name: str
    folder: Path
    domain: str
    records: list[Record]
    descriptions: dict[str, str]

    def of_class(self, class_name: str) -> list[Record]:
        """The records of one class."""
        return [record for record in self.records if record.class_name == class_name]


def canonical_name(name: str) -> str:
    """Name of a data set that is given as its folder, its JSON lines file or one of its accepted names."""
    path = Path(name)
    last = (path.parent if path.suffix == ".jsonl" else path).resolve().name if _is_path(name) else name
    return next((known for known, info in DATA_SETS.items() if last in (Path(f).name for f in info.folders)), last)


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name


def open_dataset(name: str, data_root: str | Path, domain: str | None = None) -> DataSet:
    """Find a data set and read its records.

    `name`: a known name or a folder under `data_root`; with a path separator, a folder or JSON lines file by its path.
    `domain` ("industrial" or "medical") is for data sets that are not known; those have their own.
    Raises FileNotFoundError where the folder, its metadata or a file is missing, ValueError for a broken line.
    """
    folder, metadata = _locate(Path(name)) if _is_path(name) else _find(name, Path(data_root))
    name = canonical_name(name)
    info = DATA_SETS.get(name)
    if info and domain and domain != info.domain:
        raise ValueError(f"--domain {domain}: {name} is {info.domain}.")
    records = read_records(metadata, folder)
    classes = list(dict.fromkeys(record.class_name for record in records))
    if info:  # known classes in the published order, others after them
        classes.sort(key=lambda c: list(info.classes).index(c) if c in info.classes else len(info.classes))
    described = {class_name: describe_class(name, class_name) for class_name in classes}
    descriptions = {class_name: description for class_name, (description, _) in described.items()}
    plain = [description for description, known in described.values() if not known]
    if plain:
        logger.info("%s: no descriptive names for some classes; the prompts say '%s'.", name, "', '".join(plain))
    return DataSet(name, folder, info.domain if info else domain or next(iter(BLUR)), records, descriptions)


def _locate(path: Path) -> tuple[Path, Path]:
    """Folder and metadata file of a data set given by its path."""
    metadata = path / "full-shot.jsonl" if path.is_dir() else path
    if not metadata.is_file():
        raise FileNotFoundError(f"{metadata}: no such file; expected JSON lines, or a folder with a full-shot.jsonl.")
    return metadata.parent, metadata


def _find(name: str, root: Path) -> tuple[Path, Path]:
    """Folder and metadata file of a data set under the data root."""
    info = DATA_SETS.get(name)
    folders = [name, *(info.folders if info else ())]
    present = [root / candidate for candidate in folders if (root / candidate).is_dir()]
    folder = next((path for path in present if (path / "full-shot.jsonl").is_file()), present[0] if present else None)
    if folder is None:
        tree = "\n".join(f"    {root / candidate}/full-shot.jsonl" for candidate in folders)
        others = sorted(path.parent.name for path in root.glob("*/full-shot.jsonl")) if root.is_dir() else []
        what = f"'{root}' has no folder of it" if root.is_dir() else f"'{root}' does not exist"
        raise FileNotFoundError(
            f"Data set {name}: {what}. Expected one of\n{tree}\n    with the images and masks beside it.\n"
            f"Data sets there: {', '.join(others) or 'none'}. Give the right place with --data_root DIR."
        )
    candidates = [folder / "full-shot.jsonl", METADATA / name / "full-shot.jsonl"]
    metadata = next((path for path in candidates if path.is_file()), None)
    if metadata is None:
        raise FileNotFoundError(
            f"Data set {name}: found {folder}, but no metadata. Expected {candidates[0]} or {candidates[1]}: "
            'one JSON object a line, {"image_path", "label", "class_name", "mask_path"}.'
        )
    return folder, metadata


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
