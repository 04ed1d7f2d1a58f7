"""Folders of own images -> records, in the trees that people have: as MVTec's, or good/ and bad/, under many names."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dataset.images import read_mask_pixels
from dataset.layouts import anomalous_records, find_masks, images_in, is_image, masks_beside, normal_records
from dataset.records import Record, check_class

# What folders are called, in any case, with - or a space for _.
NORMAL = ("good", "ok", "normal", "nominal", "no_defect", "defect_free", "non_defective")
ANOMALOUS = (
    *("bad", "ng", "nok", "ko", "not_ok", "not_good", "ungood", "defect", "defects", "defective", "faulty", "damaged"),
    *("anomaly", "anomalies", "anomalous", "abnormal"),
)
TEST, TRAIN = ("test", "testing", "test_public"), ("train", "training", "validation", "val")
PICTURES = ("rgb", "img", "image", "images")
MASKS = ("ground_truth", "groundtruth", "gt", "mask", "masks", "label", "labels", "annotations")
TREES = """
    {0}/full-shot.jsonl    lines {{"image_path", "label", "class_name", "mask_path"}}
or, here or one folder deeper for each class,
    {0}/test/good/*.png, {0}/test/<defect>/*.png and {0}/ground_truth/<defect>/*_mask.png
    {0}/good/*.png and {0}/bad/*.png    without masks, or with masks/bad/*.png"""


def own_records(root: Path) -> list[Record]:
    """Records of own images: a tree as MVTec's, or good/ and bad/, of one class or of a folder each.

    A class is called as its folder. Where a class has no folder of masks, its anomalous images are maskless.
    Raises FileNotFoundError with the expected trees where the folder is none.
    """
    records: list[Record] = []
    for folder in products(root):
        class_name = Path(os.path.abspath(folder)).name
        check_class(class_name, str(root))
        records += _product_records(root, folder, class_name)
    if not records:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{root}: no images in a layout that is known. Expected{TREES.format(root)}\nFound {found}."
        )
    return records


def products(root: Path) -> list[Path]:
    """The folders of products: `root` itself, or those in it."""
    if _is_product(root):
        return [root]
    return [folder for folder in _folders(root) if _word(folder) not in (*TRAIN, *MASKS) and _is_product(folder)]


def _is_product(folder: Path) -> bool:
    return any(_word(inside) in (*TEST, *NORMAL, *ANOMALOUS) for inside in _folders(folder))


def _product_records(root: Path, folder: Path, class_name: str) -> Iterator[Record]:
    """The test split of a product where it has one, else its normal and its anomalous images."""
    test = _called(folder, TEST)
    kinds = [kind for kind in _folders(test or folder) if _word(kind) not in (*TRAIN, *MASKS)]
    masks = _called(folder, MASKS) or (_called(test, MASKS) if test else None)
    for kind in kinds:
        if _word(kind) in NORMAL:
            yield from normal_records(root, _pictures(kind), class_name)
    for kind in kinds:
        if _word(kind) in NORMAL:
            continue
        # In a test split all others are defects; beside good images may lie anything, but what has masks is one.
        if test or _word(kind) in ANOMALOUS or (masks and _called(masks, (_word(kind),))):
            yield from anomalous_records(root, _pictures(kind), _masks_of(kind, masks), class_name)
    if test:
        yield from _flat_records(root, test, masks, class_name)


def _flat_records(root: Path, folder: Path, masks: Path | None, class_name: str) -> Iterator[Record]:
    """Images of a test split that lie in no folder of a kind; those with a defect in their mask are anomalous.

    Masks lie in a folder of their own, as in DAGM, or beside the images, as in KolektorSDD2 (7.png, 7_GT.png).
    """
    images = images_in(folder)
    if masks is None:
        found = masks_beside(images)
        images = [image for image in images if image not in found.values()]
        if not found and images:
            return  # nothing tells which are good
    else:
        found = find_masks(images, masks)
    for image in images:
        name, mask = image.relative_to(root).as_posix(), found.get(image)
        if mask is not None and read_mask_pixels(mask).defect.any():
            yield Record(name, 1, class_name, mask.relative_to(root).as_posix())
        else:
            yield Record(name, 0, class_name)


def _pictures(kind: Path) -> Path:
    """Where the images of a kind lie: in its folder, or in one in it, as in MVTec 3D-AD, which has depths as well."""
    return kind if images_in(kind) else _called(kind, PICTURES) or kind


def _masks_of(kind: Path, masks: Path | None) -> Path | None:
    """Where the masks of a kind of defect lie: within it, in a folder called as it is, or all in one."""
    if (own := _called(kind, MASKS)) or masks is None:
        return own
    if not _folders(masks):
        return masks
    return _called(masks, (_word(kind),)) or masks / kind.name


def unread(root: Path, records: list[Record]) -> list[str]:
    """A line for each folder with images that no record names, but for those of train splits."""
    known = {path for record in records for path in (record.image_path, record.mask_path) if path}
    within = {Path(record.image_path).parent.as_posix() for record in records}
    found: Counter[str] = Counter()
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and _word(Path(name)) not in TRAIN)
        relative = Path(place).relative_to(root)
        if relative.as_posix() in known:  # several masks of one image
            continue
        for name in files:
            is_mask = relative.as_posix() in within  # beside the images that are read
            if is_image(Path(place, name)) and (relative / name).as_posix() not in known and not is_mask:
                found[relative.as_posix()] += 1
    return [
        f"{count} masks in {place} are of no image."
        if any(_word(part) in MASKS for part in (Path(place), *Path(place).parents))
        else f"{count} images in {place} are not read: no folder above them says whether they are good or bad."
        for place, count in found.items()
    ]


def _called(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first folder in a folder that is called as one of the names."""
    return next((inside for inside in _folders(folder) if _word(inside) in names), None)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _word(folder: Path) -> str:
    return folder.name.casefold().replace("-", "_").replace(" ", "_")
