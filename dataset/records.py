"""Records of a data set: read from AA-CLIP's JSON lines, checked, divided and written.

A line is {"image_path", "label", "class_name", "mask_path"}, with paths relative to the data set's folder.
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from dataset.files import write_text
from dataset.words import is_harmless

# What a line of a list may say of an image.
LISTED = ("image_path", "label", "class_name", "mask_path")
# Characters of a name or a path in a list.
LONGEST = 4096


@dataclass(frozen=True)
class Record:
    """One image: `label` 0 normal or 1 anomalous; `mask_path` None for normal and for maskless images.

    `bits` of the image's values, if its file has 16, the px that JPEG files are `reduced_to`, see `read_image`, and
    whether masks of its set are `lossy`, see `read_mask_pixels`: how its files are read, not which they are.
    """

    image_path: str
    label: int
    class_name: str
    mask_path: str | None = None
    bits: int = field(default=16, repr=False, compare=False)
    lossy: bool = field(default=False, repr=False, compare=False)
    reduced_to: int | None = field(default=None, repr=False, compare=False)

    @property
    def has_mask(self) -> bool:
        """Whether it is known where its defects are: a normal image has none."""
        return not self.label or self.mask_path is not None


def read_records(metadata: Path) -> list[Record]:
    """Read a JSON lines file. Raises ValueError that names the line at fault; files are not looked for."""
    # Some published lists give normal images a mask path that does not exist; it would not be read.
    records = [
        Record(
            entry["image_path"],
            int(entry["label"]),
            entry["class_name"],
            entry["mask_path"] if entry["label"] else None,
        )
        for entry in read_entries(metadata)
    ]
    if not records:
        raise ValueError(f"{metadata}: no records; expected one JSON object a line.")
    if path := next(two_labels(records), None):
        raise ValueError(f"{metadata}: '{path}' is normal in one entry and anomalous in another.")
    return records


def two_labels(records: list[Record]) -> Iterator[str]:
    """The images that are normal in one record and anomalous in another."""
    labels: dict[str, int] = {}
    for record in records:
        if labels.setdefault(os.path.normpath(record.image_path), record.label) != record.label:
            yield record.image_path


def read_entries(metadata: Path) -> Iterator[dict]:
    """The entries of a list, checked; `mask_path` is None where there is none.

    A list has one JSON object a line, or is one JSON array of them, or AnomalyCLIP's meta.json, whose test split counts
    (https://github.com/zqhang/AnomalyCLIP).
    """
    with open(metadata, "rb") as lines:
        start = lines.read(4).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[" or (metadata.suffix.casefold() == ".json" and not _is_lines(metadata)):
        yield from _read_whole(metadata)
        return
    with open(metadata, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{metadata}, line {number}"
            text = _decoded(line, where).strip()
            if text:
                yield check_entry(_parsed(text, where), where)


def _is_lines(metadata: Path) -> bool:
    """Whether the first line of a file is an object by itself, with others after it."""
    with open(metadata, "rb") as lines:
        first, second = lines.readline(), lines.readline()
    try:
        return isinstance(json.loads(first), dict) and bool(second.strip())
    except (ValueError, RecursionError):
        return False


def _read_whole(metadata: Path) -> Iterator[dict]:
    content = read_json(metadata)
    if isinstance(content, dict):
        splits = content.get("test")
        if not isinstance(splits, dict) or not all(isinstance(entries, list) for entries in splits.values()):
            raise ValueError(
                f"{metadata}: expected an array of objects, or AnomalyCLIP's 'test' with an array of each class."
            )
        content = [_of_anomalyclip(entry) for entries in splits.values() for entry in entries]
    for number, entry in enumerate(content, start=1):
        where = f"{metadata}, entry {number}"
        yield check_entry(entry, where)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError where it is none."""
    return _parsed(_decoded(path.read_bytes(), str(path)), f"{path}, line 1")


def _of_anomalyclip(entry: Any) -> Any:
    """An entry of AnomalyCLIP's meta.json under our names."""
    names = {"img_path": "image_path", "anomaly": "label", "cls_name": "class_name"}
    return {names.get(key, key): value for key, value in entry.items()} if isinstance(entry, dict) else entry


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}). Save the file as UTF-8.") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, a thousand brackets
        raise ValueError(f"{where}: not JSON ({error}): {text[:80]}") from error


def check_entry(entry: Any, where: str) -> dict:
    """What a list says of an image, with `mask_path` None where there is none. Raises ValueError that names `where`."""
    required = ("image_path", "label", "class_name")
    missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ValueError(f"{where}: expected an object with {', '.join(required)}; {missing[0]} is missing.")
    if entry["label"] in ("0", "1"):
        entry["label"] = int(entry["label"])
    if entry["label"] not in (0, 1):
        raise ValueError(f"{where}: label is {_shown(entry['label'])}, expected 0 (normal) or 1 (anomalous).")
    entry["mask_path"] = _mask_path(entry)
    for key in ("image_path", "class_name", "mask_path"):
        if not (entry[key] and isinstance(entry[key], str)) and (key, entry[key]) != ("mask_path", None):
            raise ValueError(f"{where}: {key} is {_shown(entry[key])}, expected a text.")
        if entry[key] and (fault := _fault(entry[key], key != "class_name")):
            raise ValueError(f"{where}: {key} {fault}.")
        if entry[key] and key != "class_name":  # as Windows writes them
            entry[key] = entry[key].replace("\\", "/")
    check_class(entry["class_name"], where)
    return entry


def _fault(text: str, is_path: bool) -> str | None:
    """What is wrong with a path or a name in a list."""
    if len(text) > LONGEST:
        return f"has {len(text)} characters, expected at most {LONGEST}"
    if not _is_text(text):
        return f"is {_shown(text)}, which no file can be called"
    return f"{_shown(text)} lies outside the data set's folder" if is_path and leaves_folder(text) else None


def check_class(name: str, where: str) -> None:
    """Raise ValueError, beginning with `where`, for a class that cannot be called so in prompts and tables."""
    if not (name.isprintable() or all(map(is_harmless, name))) or not name.strip():
        raise ValueError(f"{where}: a class is called {_shown(name)}; expected a name, without control characters.")


def _mask_path(entry: dict) -> Any:
    """What an entry says of its mask, None where it says nothing, as with the NaN that pandas writes."""
    found = entry.get("mask_path") or None
    if isinstance(found, float) and math.isnan(found):
        return None
    if entry["label"]:
        return found
    # Of a normal image it is not read, whatever it is.
    return found if isinstance(found, str) and not _fault(found, is_path=True) else None


def _is_text(path: str) -> bool:
    """Whether a file may be called so: bytes that are no UTF-8 may, half a surrogate pair and NUL may not."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _shown(value: object) -> str:
    """A value of a list in a message, cut where it is long."""
    return repr(value if isinstance(value, (str, int, float, type(None))) else type(value).__name__)[:80]


def leaves_folder(relative: str) -> bool:
    """Whether a path, on this system or on Windows, is not inside the folder that it should be relative to."""
    if ".." not in relative and ":" not in relative and not relative.startswith(("/", "\\")):
        return False  # which most are not, and is quickly said
    path = PureWindowsPath(relative)  # knows both separators
    return bool(path.anchor) or os.path.normpath(path.as_posix()).split(os.sep)[0] == ".."


def check_paths(
    records: list[Record],
    folder: Path,
    follow_links: bool = False,
    metadata: Path | None = None,
    missing_too: bool = False,
) -> None:
    """Raise FileNotFoundError where an image or a mask is missing, unless `missing_too`, with the first and the number.

    And ValueError where links lead out of the folder, unless `follow_links`: a list from elsewhere could name any file.
    `metadata` is the list of the records, if there is one.
    """
    paths = [path for record in records for path in (record.image_path, record.mask_path) if path]
    missing = [] if missing_too else [path for path in paths if not os.path.isfile(os.path.join(folder, path))]
    images = {record.mask_path: record.image_path for record in records}
    # A mask may be a folder of masks.
    missing = [path for path in missing if path not in images or not os.path.isdir(os.path.join(folder, path))]
    if missing:
        first, given = missing[0], str(metadata or f"{folder}{os.sep}")
        whose = f", the mask of '{images[first]}'" if first in images else ""
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of its images and masks are not there, the first is '{first}'{whose}"
            f"{_beside(Path(folder, first))}. --skip_broken leaves these images out. All of them: "
            f"python -m dataset.check {shlex.quote(given)}"
        )

    for path in paths if not follow_links else ():
        if target := link_target(folder, path):
            raise ValueError(
                f"{folder}: '{path}' leads to {target}, outside the data set's folder. If that is meant, as with links "
                "to another disk, --follow_links reads it."
            )


def _beside(missing: Path) -> str:
    """What lies where a file should be, in words."""
    if missing.is_dir() or missing.is_symlink():
        return f" (it is {'a folder' if missing.is_dir() else 'a link that leads nowhere'})"
    if not missing.parent.is_dir():
        return f" (no folder {missing.parent.name})"
    names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    return (
        f" (its folder has {', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        if names
        else " (its folder is empty)"
    )


def link_target(folder: Path, path: str) -> str | None:
    """Where a path in a data set's folder leads, if that is outside; None if not."""
    root, target = os.path.realpath(folder), os.path.realpath(os.path.join(folder, path))
    return None if target.startswith(os.path.join(root, "")) else target


def write_records(path: Path, records: list[Record]) -> None:
    """Write `records` as JSON lines: all of them, or nothing."""
    lines = (json.dumps({k: v for k in LISTED if (v := getattr(record, k)) is not None}) for record in records)
    write_text(path, "".join(f"{line}\n" for line in lines))


def digest(records: list[Record]) -> str:
    """SHA-256 of what the records say, in their order."""
    return hashlib.sha256("\n".join(map(repr, records)).encode("utf-8", "backslashreplace")).hexdigest()


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


def hold_out_classes(records: list[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Divide into a training part and `count` whole classes, drawn with `seed`.

    Raises ValueError where no class is left to train on.
    """
    classes = list(dict.fromkeys(record.class_name for record in records))
    if count >= len(classes):
        raise ValueError(f"{count} classes to hold out: expected at most {len(classes) - 1} of {', '.join(classes)}.")
    held = {classes[index] for index in np.random.default_rng(seed).permutation(len(classes))[:count]}
    return [r for r in records if r.class_name not in held], [r for r in records if r.class_name in held]


def partners(records: list[Record], seed: int) -> dict[Record, Record]:
    """Another image of its class for each record, drawn with `seed`; its label says nothing of the record's own.

    The label is that of any image of the class, the record's own among them; where the class has no other image of that
    label, any other is taken. Raises ValueError for a class of one image.
    """
    found, rng = {}, np.random.default_rng(seed)
    groups = _groups(list(dict.fromkeys(records)))
    for class_name in dict.fromkeys(record.class_name for record in records):
        kinds = groups[class_name, 0], groups[class_name, 1]
        members = kinds[0] + kinds[1]
        if len(members) < 2:
            raise ValueError(
                f"--image_context another: class '{class_name}' has one image here, {members[0].image_path}."
            )
        for record in members:
            kind = kinds[members[rng.integers(len(members))].label]
            found[record] = _another(record, members if kind == [record] else kind, rng)
    return found


def _another(record: Record, group: list[Record], rng: np.random.Generator) -> Record:
    other = record
    while other == record:
        other = group[rng.integers(len(group))]
    return other


def _groups(records: list[Record]) -> dict[tuple[str, int], list[Record]]:
    """{(class, label): records}; both labels of every class are there, so that an absent kind is seen."""
    groups: dict[tuple[str, int], list[Record]] = {
        (class_name, label): [] for class_name in dict.fromkeys(r.class_name for r in records) for label in (0, 1)
    }
    for record in records:
        groups[record.class_name, record.label].append(record)
    return groups


def _draw(group: list[Record], count: int, seed: int) -> list[Record]:
    order = np.random.default_rng(seed).permutation(len(group))[:count]
    return [group[index] for index in sorted(order)]
