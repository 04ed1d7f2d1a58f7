"""Folders of images on disk -> records: the official layouts of the data sets, and those that own images may have.

Paths in records are relative to the data set's folder, with forward slashes on every system. Files that are no images
by their suffix, and hidden ones, are passed over.
"""

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset.records import Record, check_class, check_entry, leaves_folder

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".jp2", ".j2k", ".pgm", ".ppm", ".pbm", ".pnm"),
)
NORMAL_KINDS = ("good", "ok", "normal")
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
OWN_TREES = """
    {0}/full-shot.jsonl    lines {{"image_path", "label", "class_name", "mask_path"}}
or, here or one folder deeper for each class,
    {0}/test/good/*.png, {0}/test/<defect>/*.png and {0}/ground_truth/<defect>/*_mask.png
    {0}/good/*.png and {0}/bad/*.png    without masks"""


def images_in(folder: Path) -> list[Path]:
    """The images of a folder by name; of none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


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
    """Records of anomalous images; with `masks`, each has its mask there, called as the image or with _mask behind.

    Of a mask that is not there the record names the place where it should be.
    """
    found = {mask.stem.removesuffix("_mask"): mask for mask in images_in(masks)} if masks else {}
    for image in images_in(folder):
        mask = found.get(image.stem, masks / f"{image.stem}_mask.png").relative_to(root).as_posix() if masks else None
        yield Record(image.relative_to(root).as_posix(), 1, class_name, mask)


def product_records(root: Path, folder: Path, class_name: str, masked: bool) -> Iterator[Record]:
    """test/<kind>/ and ground_truth/<kind>/ of one product, as in MVTec; the kinds good, ok and normal are normal."""
    kinds = sorted(path for path in folder.glob("test/*") if path.is_dir() and not path.name.startswith("."))
    for kind in kinds:
        if kind.name.lower() in NORMAL_KINDS:
            yield from normal_records(root, kind, class_name)
    for kind in kinds:
        if kind.name.lower() not in NORMAL_KINDS:
            masks = folder / "ground_truth" / kind.name if masked else None
            yield from anomalous_records(root, kind, masks, class_name)


def mvtec(root: Path, classes: list[str]) -> Iterator[Record]:
    """MVTec, MPDD and BTAD: the test split of each product."""
    for class_name in classes:
        yield from product_records(root, root / class_name, class_name, masked=True)


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
    """Polyps: images and masks, all anomalous."""
    (class_name,) = classes
    yield from anomalous_records(root, root / "images", root / "masks", class_name)


# {layout: (folder, classes) -> records}
LAYOUTS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    "mvtec": mvtec,
    "visa": visa,
    "good_ungood": good_ungood,
    "images_masks": images_masks,
}


def own_records(root: Path) -> list[Record]:
    """Records of own images: a tree as MVTec's, or good/ and bad/ without masks, of one class or of a folder each.

    A class is called as its folder. Where a class has no ground_truth folder, its anomalous images are maskless.
    Raises FileNotFoundError with the expected trees where the folder is none.
    """
    products = [root] if _is_product(root) else sorted(path for path in root.iterdir() if _is_product(path))
    records: list[Record] = []
    for folder in products:
        class_name = Path(os.path.abspath(folder)).name
        check_class(class_name, str(root))
        if (folder / "test").is_dir():
            records += product_records(root, folder, class_name, masked=(folder / "ground_truth").is_dir())
        else:
            records += normal_records(root, folder / "good", class_name)
            records += anomalous_records(root, folder / "bad", None, class_name)
    if not records:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{root}: no images in a layout that is known. Expected{OWN_TREES.format(root)}\nFound {found}."
        )
    return records


def _is_product(folder: Path) -> bool:
    return (folder / "test").is_dir() or ((folder / "good").is_dir() and (folder / "bad").is_dir())


def train_images(root: Path) -> list[Path]:
    """The images of the train splits that lie beside the test splits of trees as MVTec's."""
    folders = sorted(path for pattern in ("train/*", "*/train/*") for path in root.glob(pattern) if path.is_dir())
    return [image for folder in folders for image in images_in(folder)]
