"""Data sets on disk: found by name under the data root or by path, from their metadata or from their folders.

All of it only reads; `dataset.prepare` renders and writes what is missing.
"""

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dataset.constants import BLUR, DATA_SETS, DataSetInfo, describe_class
from dataset.demo.build import DEMO_SETS, check_version
from dataset.layouts import LAYOUTS, check_owners
from dataset.own import ANOMALOUS, NORMAL, has_test_split, own_records, products, unread
from dataset.records import Record, check_paths, few_shot, read_records

logger = logging.getLogger(__name__)

METADATA = Path(__file__).parent / "metadata"
FULL = "full-shot.jsonl"
# Endings of lists of images.
LISTS = (".jsonl", ".json")
# The layout of sets that lie as own images may, see `dataset.own`.
OWN = "own"
# Behind the name of a known set whose folder holds what it does not.
OWN_SUFFIX = "_own"


@dataclass(frozen=True)
class Place:
    """Where a data set lies; `name` and `source` as in `DataSet`.

    `metadata` is None where there is no list of it: its folder tells. `note`: what is to be said of the folder.
    """

    name: str
    source: str
    folder: Path
    metadata: Path | None
    note: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether these are own images in folders."""
        return self.metadata is None and self.source not in DATA_SETS


@dataclass(frozen=True)
class DataSet:
    """A data set on disk, or the part of one that a list names.

    `name`: what results and files about it are called, with the class that was given for it behind.
    `source`: the data set that it is, or is part of, which tells whether a model was trained on it. `descriptions`:
    {class: its name in the prompts}, in the order of the classes.
    """

    name: str
    source: str
    folder: Path
    domain: str
    records: list[Record]
    descriptions: dict[str, str]

    def of_class(self, class_name: str) -> list[Record]:
        """The records of one class."""
        return [record for record in self.records if record.class_name == class_name]

    @property
    def reported(self) -> dict[str, float]:
        """{metric: percent} that AA-CLIP's authors report for it; empty where a class has another number of images."""
        info = DATA_SETS.get(self.source)
        if info is None or self.name != self.source or count_images(self.records) != info.counts:
            return {}
        return dict(info.reported)


def canonical_name(name: str) -> str:
    """Name of the data set that is given as its folder, as a list of it or of a part, or by one of its names."""
    path = Path(name)
    # Not resolved: a link is called as it is, not as what it points to.
    last = Path(os.path.abspath(path.parent if is_list(name) else path)).name if is_path(name) else name
    for known, info in DATA_SETS.items():
        if last.casefold() in {known.casefold(), *(Path(folder).name.casefold() for folder in info.folders)}:
            return known
    return last


def result_name(name: str) -> str:
    """What results and files about a data set are called, told from the argument alone.

    A list that is not called full-shot.jsonl may hold a part of the images, so it adds its own name: results of a part
    never replace those of the whole. Raises ValueError where that makes no name, or one of a known data set.
    """
    source, path = canonical_name(name), Path(name)
    if not is_list(name) or path.name.casefold() == FULL:
        return source
    own = f"{source}_{path.stem}"
    # Windows drops full stops and spaces at the end of a folder's name, so two names would be one.
    if not path.stem.isprintable() or path.stem.endswith((" ", ".")):
        raise ValueError(
            f"--dataset {name}: files about it are called as the list, so rename it: no control characters, no space "
            "or full stop before .jsonl."
        )
    if canonical_name(own) in DATA_SETS:
        raise ValueError(
            f"--dataset {name}: files about it would be called {own}, which is a name of {canonical_name(own)}. "
            "Rename the list."
        )
    return own


def is_path(name: str) -> bool:
    """Whether a data set is given by its path, rather than by a name under the data root."""
    return "/" in name or os.sep in name or name in (".", "..")


def is_list(name: str) -> bool:
    """Whether a data set is given by the path of a list."""
    return is_path(name) and Path(name).suffix.casefold() in LISTS


def open_dataset(
    name: str,
    data_root: str | Path,
    domain: str | None = None,
    class_name: str | None = None,
    follow_links: bool = False,
    skip_broken: bool = False,
) -> DataSet:
    """Find a data set and read its records; nothing is written.

    `name`: a known name or a folder under `data_root`; with a path separator, a folder or JSON lines file by its path.
    `domain` ("industrial" or "medical") and `class_name` (of all its images) are for data sets that are not known;
    those have their own. A known one without metadata is read from its official layout. Links that lead out of the
    folder are an error unless `follow_links`, missing files unless `skip_broken`, which leaves them to `survey`.
    Raises FileNotFoundError where the folder or a file is missing, ValueError for what is wrong in it.
    """
    place = find_dataset(name, data_root)
    info = DATA_SETS.get(place.source)
    if info and domain and domain != info.domain:
        raise ValueError(f"--domain {domain}: {place.source} is {info.domain}.")
    if info and class_name:
        raise ValueError(
            f"--class_name {class_name}: {place.source} has its own names; the flag is for other data sets. To use a "
            f"part of it, give the path of a list with these lines of {FULL}, such as {place.folder / 'part.jsonl'}."
        )
    found = read_place(place, follow_links, skip_broken)
    own = {record.class_name for record in found}
    records = named(found, class_name)
    for line in count_differences(place.source, records):
        logger.warning("%s: %s.", place.name, line)
    descriptions, plain = _describe(place.source, records)
    if plain and not class_name:
        logger.info("%s: no descriptive names for some classes; the prompts say '%s'.", place.name, "', '".join(plain))
    found_domain = info.domain if info else domain or next(iter(BLUR))
    name = place.name
    if class_name and class_name not in own:  # other prompts give other results, which take another name
        name += "_" + re.sub(r"[^\w.-]", "_", class_name)
    return DataSet(name, place.source, place.folder, found_domain, records, descriptions)


def _describe(source: str, records: list[Record]) -> tuple[dict[str, str], list[str]]:
    """{class: its name in the prompts}, known classes first and in the published order; and which go by their own."""
    info = DATA_SETS.get(source)
    published = list(info.classes) if info else []
    found = dict.fromkeys(record.class_name for record in records)
    classes = [name for name in published if name in found] + [name for name in found if name not in published]
    described = {name: describe_class(source, name) for name in classes}
    plain = [description for description, given in described.values() if not given]
    return {name: description for name, (description, _) in described.items()}, plain


def open_all(names: list[str], data_root: str | Path, **own: Any) -> list[DataSet]:
    """`open_dataset` of several. Raises ValueError where two have one result name, and so would files about them."""
    data_sets = [open_dataset(name, data_root, **own) for name in names]
    counts = Counter(data.name.casefold() for data in data_sets)  # as Windows compares the names of files
    for data in data_sets:
        if (count := counts[data.name.casefold()]) > 1:
            raise ValueError(
                f"{count} data sets are called {data.name}, and so would be their files. Test them in two calls, "
                "each with a --save_path of its own."
            )
    return data_sets


def find_dataset(name: str, data_root: str | Path) -> Place:
    """Where a data set lies.

    Raises FileNotFoundError where there is none, ValueError for a file that is no list, or one called as another set.
    """
    source = canonical_name(name)
    if not is_path(name):
        folder = _find_folder(name, source, Path(data_root))
    elif Path(name).is_file():
        return _place_of_list(name, Path(data_root))
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise FileNotFoundError(f"--dataset {name}: no such folder or file.")
    candidates = (folder / FULL, metadata_folder(source) / FULL)
    metadata = next((path for path in candidates if path.is_file()), None)
    if metadata is None and (own := _own_products(source, folder)):
        note = (
            f"{folder} is called as {source} and holds what that does not ({', '.join(own)}), so all of it is taken "
            "for own images. Rename the folder, or move them elsewhere."
        )
        return Place(source + OWN_SUFFIX, source + OWN_SUFFIX, folder, None, note)
    return Place(source, source, folder, metadata)


def _own_products(source: str, folder: Path) -> list[str]:
    """Products in the folder of a known data set that are not of it."""
    info = DATA_SETS.get(source)
    if info is None or info.layout is None:
        return []
    found = [product.name for product in products(folder) if product == folder or product.name not in info.classes]
    if not found or has_product_folders(info) or (info.layout == OWN and not has_test_split(folder)):
        return found
    return [] if official_records(info, folder) else found  # it lies as it should, in folders that a product might have


def has_product_folders(info: DataSetInfo) -> bool:
    """Whether a known data set has a folder for each product, and nothing beside them."""
    return info.layout in ("mvtec", "visa") or (info.layout == OWN and len(info.classes) > 1)


def official_records(info: DataSetInfo, folder: Path) -> list[Record]:
    """What the folder of a known data set holds of it, by its official layout."""
    if info.layout is None:
        return []
    if info.layout != OWN:
        records = list(LAYOUTS[info.layout](folder, list(info.classes)))
        check_owners(records)
        return records
    found = own_records(folder)
    if len(info.classes) == 1:
        return named(found, next(iter(info.classes)))
    return [record for record in found if record.class_name in info.classes]


def _place_of_list(name: str, data_root: Path) -> Place:
    """The place of a JSON lines file. Raises ValueError where it is none, or called as another data set would be."""
    path = Path(name)
    if not is_list(name):
        raise ValueError(
            f"--dataset {name}: expected a folder or a list ({' or '.join(LISTS)}), found a file of another kind."
        )
    source, own = canonical_name(name), result_name(name)
    if own != source:
        for other in (Path(os.path.abspath(path)).parent.parent / own, data_root / own):
            if other.is_dir():
                raise ValueError(
                    f"--dataset {name}: files about it would be called {own}, as those about the folder {other}. "
                    "Rename the list."
                )
    return Place(own, source, path.parent, path)


def metadata_folder(source: str) -> Path:
    """Where lists of a data set lie that are not in its own folder."""
    return METADATA / source


def _find_folder(given: str, name: str, root: Path) -> Path:
    """Folder of a data set under the data root, in letters of any case; one with metadata goes before one without.

    The spelling that is `given` is tried before the data set's own `name`.
    """
    info = DATA_SETS.get(name)
    folders = list(dict.fromkeys([given, name, *(info.folders if info else ())]))
    present = [folder for candidate in folders if (folder := _in_any_case(root, candidate))]
    if present and name in DEMO_SETS:
        check_version(present[0])
    if present:
        return next((path for path in present if (path / FULL).is_file()), present[0])
    tree = "\n".join(f"    {root / candidate}" for candidate in folders)
    others = sorted(path.parent.name for path in root.glob(f"*/{FULL}")) if root.is_dir() else []
    what = f"'{root}' has no folder of it" if root.is_dir() else f"'{root}' does not exist"
    if canonical_name(root.name) == name:
        hint = f"--data_root is the folder above those of the data sets: try {root.parent}."
    elif name in DEMO_SETS:
        hint = (
            f"Render it: python -m dataset.metadata {' '.join(DEMO_SETS)} --data_root {root} (training and testing do "
            "so themselves)."
        )
    elif Path(name).is_file():
        hint = f"A list elsewhere is given as a path: .{os.sep}{name}; it has to be a .jsonl file."
    elif Path(name).is_dir():
        hint = f"A folder elsewhere is given as a path: .{os.sep}{name}."
    else:
        hint = "Give the right place with --data_root DIR."
    likely = get_close_matches(name, [*DATA_SETS, *others], 1)
    hint += f" Did you mean {likely[0]}?" if likely and likely[0] != name else ""
    raise FileNotFoundError(
        f"Data set {name}: {what}. Expected one of\n{tree}\n    with the images and masks in it "
        f"(dataset/README.md shows the trees). {hint}\n"
        f"Data sets there: {', '.join(others) or 'none'}; known: {', '.join(DATA_SETS)}."
    )


def _in_any_case(root: Path, relative: str) -> Path | None:
    """A folder below another, its name as it is or else in other letters of case."""
    if (root / relative).is_dir():
        return root / relative
    found = [root]
    for part in Path(relative).parts:
        inside = (path for folder in found if folder.is_dir() for path in sorted(folder.iterdir()))
        found = [path for path in inside if path.name.casefold() == part.casefold() and path.is_dir()]
    return found[0] if found else None


def read_place(place: Place, follow_links: bool = False, missing_too: bool = False) -> list[Record]:
    """The records of a data set, from its metadata, else from its folders.

    Raises FileNotFoundError where a file is missing, unless `missing_too`, ValueError for one outside the folder unless
    `follow_links`.
    """
    records = read_records(place.metadata) if place.metadata else list_folder(place)
    if place.metadata and (others := _not_listed(place, records)):
        logger.warning("%s: not in the list %s, so not read: %s.", place.folder, place.metadata, ", ".join(others))
    if place.note:
        logger.warning("%s", place.note)
    if place.is_own:
        _report_own(place.folder, records)
    of_part = place.metadata if place.name != place.source else None
    check_paths(records, place.folder, follow_links, of_part, missing_too)
    return records


def _not_listed(place: Place, records: list[Record]) -> list[str]:
    """Products in the folder of a data set of which its whole list says nothing."""
    info = DATA_SETS.get(place.source)
    if place.metadata is None or place.name != place.source or (info and not has_product_folders(info)):
        return []
    listed = {Path(record.image_path).parts[0] for record in records}
    found = [product for product in products(place.folder) if product != place.folder]
    return [product.name for product in found if product.name not in listed]


def _report_own(folder: Path, records: list[Record]) -> None:
    """Say what was taken for what in a folder of own images."""
    for class_name, (normal, anomalous) in count_images(records).items():
        own = [record for record in records if record.class_name == class_name]
        masks = sum(record.mask_path is not None for record in own)
        logger.info(
            "%s: %d normal images, %d anomalous ones, %d masks in its folder.", class_name, normal, anomalous, masks
        )
    for line in [*one_sided(records), *unread(folder, records)]:
        logger.warning("%s: %s", folder, line)


def one_sided(records: list[Record]) -> list[str]:
    """A line for each class of own images that has only one kind."""
    lines = []
    for class_name, (normal, anomalous) in count_images(records).items():
        if not anomalous:
            lines.append(
                f"{class_name}: no image is anomalous: folders called {', '.join(ANOMALOUS[:3])}, ... are, those of a "
                f"test split that are not called {', '.join(NORMAL[:3])}, ..., and those that a folder of masks is "
                "called as."
            )
        if not normal:
            own = [record for record in records if record.class_name == class_name]
            kinds = sorted({Path(record.image_path).parent.name for record in own})
            lines.append(
                f"{class_name}: no image is normal: folders called {', '.join(NORMAL[:3])}, ... are, those found are "
                f"defects: {', '.join(kinds)}."
            )
    return lines


def list_folder(place: Place) -> list[Record]:
    """Records that the folders of a data set give, by its official layout if it is known.

    Masks that are missing are named where they should be. Raises FileNotFoundError where there is nothing of it.
    """
    if place.source not in DATA_SETS:
        return own_records(place.folder)
    info = DATA_SETS[place.source]
    records = official_records(info, place.folder)
    if not records:
        raise FileNotFoundError(
            f"Data set {place.source}: found {place.folder}, but neither {FULL} nor images in the official layout "
            "(dataset/README.md shows it)."
        )
    return records


def count_images(records: list[Record]) -> dict[str, tuple[int, int]]:
    """{class: (normal, anomalous) images}."""
    counts: dict[str, list[int]] = {}
    for record in records:
        counts.setdefault(record.class_name, [0, 0])[record.label] += 1
    return {class_name: (normal, anomalous) for class_name, (normal, anomalous) in counts.items()}


def count_differences(source: str, records: list[Record]) -> list[str]:
    """What is to be said of each class of a known data set whose number of images is not the published one."""
    found, info = count_images(records), DATA_SETS.get(source)
    lines = []
    if info and info.layout and not info.counts:  # with published numbers the line of each class says it
        missing = [name for name in info.classes if name not in found]
        if missing:
            lines.append(f"{len(missing)} of {len(info.classes)} classes have no images: {', '.join(missing)}")
    return lines + [
        "{}: {} normal and {} anomalous images, published are {} and {}".format(
            class_name, *found.get(class_name, (0, 0)), *expected
        )
        for class_name, expected in (info.counts.items() if info else ())
        if found.get(class_name, (0, 0)) != expected
    ]


def draw_few_shot(data: DataSet, shot: int, seed: int, class_name: str | None = None) -> list[Record]:
    """The images of --shot: those of a list called <shot>-shot.jsonl where full-shot.jsonl lies, else drawn by `seed`.

    `class_name` as in `open_dataset`.
    """
    for folder in (data.folder, metadata_folder(data.source)):
        path = folder / f"{shot}-shot.jsonl"
        if path.is_file():
            records = named(read_records(path), class_name)
            if others := set(records) - set(data.records):
                raise ValueError(
                    f"{path}: {len(others)} of its {len(records)} lines are not in the data set's own list, one is of "
                    f"'{min(record.image_path for record in others)}'. Move it away, and --seed draws another."
                )
            logger.info("%s: the %d images of %s; --seed draws none.", data.name, len(records), path)
            known = {record: record for record in data.records}  # which know how their files are read
            return [known[record] for record in records]
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
