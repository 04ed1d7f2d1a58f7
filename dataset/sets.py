"""Data sets on disk: found by name under the data root or by path; the demo's are rendered on first use."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from dataset.constants import BLUR, DATA_SETS, describe_class
from dataset.demo.build import DEMO_SETS, build
from dataset.records import Record, read_records

logger = logging.getLogger(__name__)

METADATA = Path(__file__).parent / "metadata"


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
    if folder is None and name in DEMO_SETS:
        folder = build(name, root)
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
