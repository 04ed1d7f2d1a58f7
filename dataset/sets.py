"""Data sets on disk: found by name under the data root or by path, from their metadata or from their folders."""

import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.constants import BLUR, DATA_SETS, describe_class
from dataset.demo.build import DEMO_SETS, build, check_version
from dataset.layouts import LAYOUTS, NORMAL_KINDS, own_records
from dataset.records import Record, check_paths, few_shot, read_records, write_records

logger = logging.getLogger(__name__)

METADATA = Path(__file__).parent / "metadata"
FULL = "full-shot.jsonl"


@dataclass(frozen=True)
class Place:
    """Where a data set lies. `metadata` is None where there is no list of it: its folder tells."""

    name: str
    folder: Path
    metadata: Path | None


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
    # Not resolved: a link is called as it is, not as what it points to.
    last = Path(os.path.abspath(path.parent if path.suffix == ".jsonl" else path)).name if _is_path(name) else name
    for known, info in DATA_SETS.items():
        if last.casefold() in {known.casefold(), *(Path(folder).name.casefold() for folder in info.folders)}:
            return known
    return last


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name


def open_dataset(name: str, data_root: str | Path, domain: str | None = None, class_name: str | None = None) -> DataSet:
    """Find a data set and read its records.

    `name`: a known name or a folder under `data_root`; with a path separator, a folder or JSON lines file by its path.
    `domain` ("industrial" or "medical") and `class_name` (of all its images) are for data sets that are not known;
    those have their own. Metadata that a known one lacks is built from its official layout and kept.
    Raises FileNotFoundError where the folder or a file is missing, ValueError for what is wrong in it.
    """
    place = find_dataset(name, data_root)
    info = DATA_SETS.get(place.name)
    if info and domain and domain != info.domain:
        raise ValueError(f"--domain {domain}: {place.name} is {info.domain}.")
    if info and class_name:
        raise ValueError(f"--class_name {class_name}: {place.name} has its own names; the flag is for other data sets.")
    records = named(read_place(place), class_name)
    for line in count_differences(place.name, records):
        logger.warning("%s: %s.", place.name, line)
    classes = list(dict.fromkeys(record.class_name for record in records))
    if info:  # known classes in the published order, others after them
        classes.sort(key=lambda c: list(info.classes).index(c) if c in info.classes else len(info.classes))
    described = {each: describe_class(place.name, each) for each in classes}
    plain = [description for description, known in described.values() if not known]
    if plain and not class_name:
        logger.info("%s: no descriptive names for some classes; the prompts say '%s'.", place.name, "', '".join(plain))
    descriptions = {each: description for each, (description, _) in described.items()}
    return DataSet(place.name, place.folder, info.domain if info else domain or next(iter(BLUR)), records, descriptions)


def open_all(names: list[str], data_root: str | Path, **own: str | None) -> list[DataSet]:
    """`open_dataset` of several. Raises ValueError where two have one name, and so would the files about them."""
    data_sets = [open_dataset(name, data_root, **own) for name in names]
    for name, count in Counter(data.name for data in data_sets).items():
        if count > 1:
            raise ValueError(
                f"{count} data sets are called {name}, and so would be their files. Test them in two calls."
            )
    return data_sets


def find_dataset(name: str, data_root: str | Path) -> Place:
    """Where a data set lies; those of the demo are rendered on first use. Raises FileNotFoundError where it is not."""
    known = canonical_name(name)
    if not _is_path(name):
        folder = _find_folder(known, Path(data_root))
    elif Path(name).is_file():
        return Place(known, Path(name).parent, Path(name))
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise FileNotFoundError(f"--dataset {name}: no such folder or file.")
    candidates = (folder / FULL, METADATA / known / FULL)
    return Place(known, folder, next((path for path in candidates if path.is_file()), None))


def _find_folder(name: str, root: Path) -> Path:
    """Folder of a data set under the data root; one with metadata goes before one without."""
    info = DATA_SETS.get(name)
    folders = [name, *(info.folders if info else ())]
    present = [root / candidate for candidate in folders if (root / candidate).is_dir()]
    if present and name in DEMO_SETS:
        check_version(present[0])
    if present:
        return next((path for path in present if (path / FULL).is_file()), present[0])
    if name in DEMO_SETS:
        return build(name, root)
    tree = "\n".join(f"    {root / candidate}" for candidate in folders)
    others = sorted(path.parent.name for path in root.glob(f"*/{FULL}")) if root.is_dir() else []
    what = f"'{root}' has no folder of it" if root.is_dir() else f"'{root}' does not exist"
    if canonical_name(root.name) == name:
        hint = f"--data_root is the folder above those of the data sets: try {root.parent}."
    elif Path(name).is_dir():
        hint = f"A folder elsewhere is given as a path: .{os.sep}{name}."
    else:
        hint = "Give the right place with --data_root DIR."
    raise FileNotFoundError(
        f"Data set {name}: {what}. Expected one of\n{tree}\n    with the images and masks in it "
        f"(dataset/README.md shows the trees). {hint}\n"
        f"Data sets there: {', '.join(others) or 'none'}; known: {', '.join(DATA_SETS)}."
    )


def read_place(place: Place) -> list[Record]:
    """The records of a data set, from its metadata, else from its folders; a known one's are written down then.

    Raises FileNotFoundError where a file is missing.
    """
    listed, known = place.metadata is not None, place.name in DATA_SETS
    records = read_records(place.metadata) if listed else list_folder(place)
    if not listed and not known:
        _report_own(records)
    check_paths(records, place.folder)
    if not listed and known:
        path = write_metadata(place, records)
        logger.info("%s: wrote %s, %d images of its official layout.", place.name, path, len(records))
    return records


def _report_own(records: list[Record]) -> None:
    """Say what was taken for what in a folder of own images."""
    for class_name, (normal, anomalous) in count_images(records).items():
        own = [record for record in records if record.class_name == class_name]
        masks = sum(record.mask_path is not None for record in own)
        logger.info(
            "%s: %d normal images, %d anomalous ones, %d masks in its folder.", class_name, normal, anomalous, masks
        )
        if not normal:
            kinds = sorted({Path(record.image_path).parent.name for record in own})
            logger.warning(
                "%s: no image is normal: folders called %s are, those found are defects: %s.",
                class_name,
                ", ".join(NORMAL_KINDS),
                ", ".join(kinds),
            )


def list_folder(place: Place) -> list[Record]:
    """Records that the folders of a data set give, by its official layout if it is known.

    Masks that are missing are named where they should be. Raises FileNotFoundError where there is nothing of it.
    """
    if place.name not in DATA_SETS:
        return own_records(place.folder)
    info = DATA_SETS[place.name]
    records = list(LAYOUTS[info.layout](place.folder, list(info.classes))) if info.layout else []
    if not records:
        raise FileNotFoundError(
            f"Data set {place.name}: found {place.folder}, but neither {FULL} nor images in the official layout "
            "(dataset/README.md shows it)."
        )
    return records


def count_images(records: list[Record]) -> dict[str, tuple[int, int]]:
    """{class: (normal, anomalous) images}."""
    counts: dict[str, list[int]] = {}
    for record in records:
        counts.setdefault(record.class_name, [0, 0])[record.label] += 1
    return {class_name: (normal, anomalous) for class_name, (normal, anomalous) in counts.items()}


def count_differences(name: str, records: list[Record]) -> list[str]:
    """What is to be said of each class of a known data set whose number of images is not the published one."""
    found, info = count_images(records), DATA_SETS.get(name)
    return [
        "{}: {} normal and {} anomalous images, published are {} and {}".format(
            class_name, *found.get(class_name, (0, 0)), *expected
        )
        for class_name, expected in (info.counts.items() if info else ())
        if found.get(class_name, (0, 0)) != expected
    ]


def write_metadata(place: Place, records: list[Record]) -> Path:
    """Write the full list of a known data set into its folder, or into dataset/metadata where that is read-only.

    Raises ValueError where an older list in the folder cannot be replaced.
    """
    path = place.folder / FULL
    try:
        write_records(path, records)
    except OSError as error:
        if path.is_file():
            raise ValueError(f"{path} cannot be replaced ({error.strerror}), and it would go before others.") from error
        logger.info("%s cannot be written (%s).", path, error.strerror)
        path = METADATA / place.name / FULL
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, records)
    return path


def draw_few_shot(data: DataSet, shot: int, seed: int, class_name: str | None = None) -> list[Record]:
    """The images of --shot: those of a list called <shot>-shot.jsonl where full-shot.jsonl lies, else drawn by `seed`.

    `class_name` as in `open_dataset`.
    """
    for folder in (data.folder, METADATA / data.name):
        path = folder / f"{shot}-shot.jsonl"
        if path.is_file():
            records = named(read_records(path), class_name)
            if others := set(records) - set(data.records):
                raise ValueError(
                    f"{path}: {len(others)} of its {len(records)} lines are not in the data set's own list, one is of "
                    f"'{min(record.image_path for record in others)}'. Move it away, and --seed draws another."
                )
            logger.info("%s: the %d images of %s; --seed draws none.", data.name, len(records), path)
            return records
    return few_shot(data.records, shot, seed)


def named(records: list[Record], class_name: str | None) -> list[Record]:
    """The records, all called `class_name` where one is given. Raises ValueError where they have several classes."""
    if class_name is None:
        return records
    classes = sorted({record.class_name for record in records})
    if len(classes) > 1:
        raise ValueError(
            f"--class_name {class_name}: names the one class of a data set; this has {', '.join(classes)}."
        )
    return [replace(record, class_name=class_name) for record in records]
