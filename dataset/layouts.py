"""Folders of images on disk -> records: the official layouts of the data sets. Own images: `dataset.own`.

Paths in records are relative to the data set's folder, with forward slashes on every system.
"""

import csv
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dataset.images import images_in
from dataset.records import Record, check_entry, leaves_folder, read_json

NORMAL_KINDS = ("good", "ok", "normal")
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
# What a mask is called beside its image: endings and beginnings of the name.
MASK_ENDINGS = ("", "_mask", "-mask", "_gt", "_seg", "_label", "_segmentation")
MASK_BEGINNINGS = ("mask_", "gt_")


def known_good(folder: Path, class_names: list[str], tested: list[Path]) -> dict[str, list[Path]]:
    """{class: images of it that are known to be good}: in a folder for each class, or of a single class in `folder`.

    Raises FileNotFoundError where a class has none, ValueError where they have different numbers of images or where one
    of the images is `tested`.
    """
    found = {name: [] if leaves_folder(name) else images_in(folder / name) for name in class_names}
    if len(class_names) == 1 and not found[class_names[0]]:
        found = {class_names[0]: images_in(folder)}
    missing = [name for name, images in found.items() if not images]
    if missing:
        raise FileNotFoundError(
            f"--normal_images {folder}: no images of {', '.join(missing)}. Expected known good images of every class "
            f"in a folder that is called as it is, for instance {folder / missing[0]}."
        )
    if len({len(images) for images in found.values()}) > 1:
        counts = ", ".join(f"{name} {len(images)}" for name, images in found.items())
        raise ValueError(f"--normal_images {folder}: expected as many images of each class, found {counts}.")
    files = {path.resolve() for path in tested}
    for image in (image for images in found.values() for image in images):
        if image.resolve() in files:
            raise ValueError(f"--normal_images {folder}: {image} is an image of the test. Take others.")
    return found


def normal_records(root: Path, folder: Path, class_name: str) -> Iterator[Record]:
    """Records of normal images."""
    for image in images_in(folder):
        yield Record(image.relative_to(root).as_posix(), 0, class_name)


def anomalous_records(root: Path, folder: Path, masks: Path | None, class_name: str) -> Iterator[Record]:
    """Records of anomalous images; with `masks`, each has its mask there, see `find_masks`.

    Of a mask that is not there the record names the place where it should be.
    """
    images = images_in(folder)
    found = find_masks(images, masks) if masks else {}
    for image in images:
        mask = found.get(image, masks / f"{image.stem}_mask.png").relative_to(root).as_posix() if masks else None
        yield Record(image.relative_to(root).as_posix(), 1, class_name, mask)


def plain_name(name: str) -> str:
    """A name to compare: in small letters, an umlaut as one character, which macOS may write as two."""
    return unicodedata.normalize("NFC", name.casefold())


def masks_beside(images: list[Path]) -> dict[Path, Path]:
    """{image: its mask among the same files}, called as the image with _gt, _mask or the like behind."""
    there = {plain_name(image.stem): image for image in images}
    called = ((image, f"{plain_name(image.stem)}{end}") for image in images for end in MASK_ENDINGS[1:])
    return {image: there[name] for image, name in called if name in there}


def find_masks(images: list[Path], folder: Path) -> dict[Path, Path]:
    """{image: its mask in a folder}: called as the image, with or without its suffix, or as masks are beside images.

    Raises ValueError where two images have one mask, or one image has two.
    """
    there: dict[str, list[Path]] = {}
    for mask in images_in(folder):
        there.setdefault(plain_name(mask.stem), []).append(mask)
    if folder.is_dir():  # several masks of an image in a folder that is called as it is, as in MVTec LOCO
        for inside in folder.iterdir():
            if inside.is_dir() and images_in(inside):
                there.setdefault(plain_name(inside.name), []).append(inside)
    found: dict[Path, Path] = {}
    owners: dict[Path, Path] = {}
    for image in images:
        masks: list[Path] = []
        for name in (plain_name(image.name), plain_name(image.stem)):  # the suffix may say whose mask it is
            called = [*(f"{name}{end}" for end in MASK_ENDINGS), *(f"{start}{name}" for start in MASK_BEGINNINGS)]
            masks = masks or [mask for word in called for mask in there.get(word, ())]
        if len(masks) > 1:
            raise ValueError(f"{image}: is its mask {masks[0]} or {masks[1].name}? Move one of them away.")
        for mask in masks:
            if (other := owners.setdefault(mask, image)) != image:
                raise ValueError(f"{mask}: the mask of {other.name} or of {image.name}? Rename one image and its mask.")
            found[image] = mask
    return found


def check_owners(records: list[Record]) -> None:
    """Raise ValueError where two records that folders gave have one mask."""
    owners: dict[str, str] = {}
    for record in records:
        if record.mask_path is None:
            continue
        if (other := owners.setdefault(record.mask_path, record.image_path)) != record.image_path:
            raise ValueError(
                f"{record.mask_path}: the mask of {other} or of {record.image_path}? Put the masks of each kind of "
                "defect into a folder of its own that is called as the folder of its images."
            )


def product_records(root: Path, folder: Path, class_name: str) -> Iterator[Record]:
    """test/<kind>/ and ground_truth/<kind>/ of one product, as in MVTec; the kinds good, ok and normal are normal."""
    kinds = sorted(path for path in folder.glob("test/*") if path.is_dir() and not path.name.startswith("."))
    for kind in kinds:
        if kind.name.lower() in NORMAL_KINDS:
            yield from normal_records(root, kind, class_name)
    for kind in kinds:
        if kind.name.lower() not in NORMAL_KINDS:
            yield from anomalous_records(root, kind, folder / "ground_truth" / kind.name, class_name)


def mvtec(root: Path, classes: list[str]) -> Iterator[Record]:
    """MVTec, MPDD and BTAD: the test split of each product."""
    for class_name in classes:
        yield from product_records(root, root / class_name, class_name)


def visa(root: Path, classes: list[str]) -> Iterator[Record]:
    """VisA: the rows of split_csv/1cls.csv with split = test, of the classes whose folder is there."""
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such file. It belongs to VisA's download and tells the test split.")
    present = [class_name for class_name in classes if (root / class_name).is_dir()]
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := set(VISA_COLUMNS) - set(rows.fieldnames or ()):
            raise ValueError(f"{table}: expected the columns {', '.join(VISA_COLUMNS)}; missing: {', '.join(missing)}.")
        for number, row in enumerate(rows, start=2):
            if row["split"] == "test" and row["object"] in present:
                label = int(row["label"] == "anomaly")
                entry = {"image_path": row["image"], "label": label, "class_name": row["object"]}
                entry = check_entry(entry | {"mask_path": row["mask"] if label else None}, f"{table}, row {number}")
                yield Record(**entry)


def good_ungood(root: Path, classes: list[str]) -> Iterator[Record]:
    """Brain, Liver and Retina of BMAD: test/good/img, test/Ungood/img and test/Ungood/label.

    The archives differ: some hold one more folder around these, some write ungood, some anomaly_mask.
    """
    (class_name,) = classes
    for test in sorted(path for pattern in ("test", "*/test") for path in root.glob(pattern)):
        yield from normal_records(root, test / "good" / "img", class_name)
        for ungood in sorted(path for path in test.iterdir() if path.name.lower() == "ungood"):
            masks = next((path for path in (ungood / "label", ungood / "anomaly_mask") if path.is_dir()), None)
            yield from anomalous_records(root, ungood / "img", masks or ungood / "label", class_name)


def images_masks(root: Path, classes: list[str]) -> Iterator[Record]:
    """Polyps: images and masks, all anomalous; in CVC-ClinicDB's archive Original and Ground Truth.

    Some archives hold one more folder around these.
    """
    (class_name,) = classes
    for images, masks in (("images", "masks"), ("Original", "Ground Truth")):
        for folder in sorted(path for pattern in (images, f"*/{images}") for path in root.glob(pattern)):
            yield from anomalous_records(root, folder, folder.parent / masks, class_name)


def real_iad(root: Path, classes: list[str]) -> Iterator[Record]:
    """Real-IAD: the test splits of realiad_jsons/<class>.json, their images in the largest size that is there.

    Raises ValueError for a table of another form.
    """
    tables = next(
        (place for place in (root / "realiad_jsons" / "realiad_jsons", root / "realiad_jsons") if place.is_dir()), root
    )
    for class_name in classes:
        table = tables / f"{class_name}.json"
        if not table.is_file():
            continue
        places = [root / f"realiad_{size}" / class_name for size in ("raw", "1024", "512", "256")]
        images = next((place for place in places if place.is_dir()), root / class_name).relative_to(root).as_posix()
        content = read_json(table)
        if not isinstance(content, dict) or not isinstance(content.get("test"), list):
            raise ValueError(f"{table}: expected an object with 'test', an array of images.")
        for number, row in enumerate(content["test"], start=1):
            where = f"{table}, entry {number}"
            if not isinstance(row, dict) or not all(
                isinstance(row.get(key), str) for key in ("image_path", "anomaly_class")
            ):
                raise ValueError(f"{where}: expected an object with image_path and anomaly_class.")
            label, mask = int(row["anomaly_class"] != "OK"), row.get("mask_path")
            entry: dict[str, Any] = {
                "image_path": f"{images}/{row['image_path']}",
                "label": label,
                "class_name": class_name,
            }
            entry = check_entry(entry | {"mask_path": f"{images}/{mask}" if label and mask else None}, where)
            yield Record(**entry)


# {layout: (folder, classes) -> records}
LAYOUTS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    "mvtec": mvtec,
    "visa": visa,
    "good_ungood": good_ungood,
    "images_masks": images_masks,
    "real_iad": real_iad,
}


def train_images(root: Path) -> list[Path]:
    """The images of the train splits that lie beside the test splits of trees as MVTec's."""
    folders = sorted(path for pattern in ("train/*", "*/train/*") for path in root.glob(pattern) if path.is_dir())
    return [image for folder in folders for image in images_in(folder)]
