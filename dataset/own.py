"""Folders of own images -> records, in the trees that people have: as MVTec's, or good/ and bad/, under many names."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dataset.images import images_in, is_image, read_mask_pixels
from dataset.layouts import check_owners, find_masks, masks_beside, plain_name
from dataset.records import Record, check_class
from dataset.words import named_few

# What folders are called, in any case, with - or a space for _.
NORMAL = (
    *("good", "ok", "normal", "nominal", "no_defect", "defect_free", "non_defective"),
    *("io", "i.o.", "gut", "良品", "合格", "正常"),
)
ANOMALOUS = (
    *("bad", "ng", "nok", "ko", "not_ok", "not_good", "ungood", "defect", "defects", "defective", "faulty", "damaged"),
    *("anomaly", "anomalies", "anomalous", "abnormal"),
    *("nio", "n.i.o.", "schlecht", "defekt", "不良", "不良品", "不合格", "缺陷", "异常"),
)
TEST, TRAIN = ("test", "testing", "test_public"), ("train", "training", "validation", "val")
PICTURES = ("rgb", "img", "image", "images")
MASKS = ("ground_truth", "groundtruth", "gt", "mask", "masks", "label", "labels", "annotations")
# Folders within folders that are looked into.
DEEPEST = 4
# Files beside photographs that are none.
DOCUMENTS = ("txt", "md", "pdf", "html", "json", "jsonl", "xml", "csv", "tsv", "yml", "yaml", "log", "db", "ini", "zip")
TREES = """
    {0}/full-shot.jsonl    lines {{"image_path", "label", "class_name", "mask_path"}}
or, here or in a folder for each class,
    {0}/test/good/*.png, {0}/test/<defect>/*.png and {0}/ground_truth/<defect>/*_mask.png
    {0}/good/*.png and {0}/bad/*.png    without masks, or with masks/bad/*.png
    {0}/images/*.png and {0}/masks/*.png    where masks tell which images are anomalous"""


def own_records(root: Path) -> list[Record]:
    """Records of own images, of one class or of a folder for each.

    The trees are MVTec's, good/ and bad/, or images/ and masks/. A class is called as its folder. Where it has no
    masks, its anomalous images are maskless. Raises FileNotFoundError with the expected trees where the folder is none,
    ValueError where masks and images do not pair.
    """
    records: list[Record] = []
    for folder in products(root, DEEPEST):
        class_name = Path(os.path.abspath(folder)).name
        check_class(class_name, str(root))
        records += _product_records(root, folder, class_name)
    if not records:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{root}: no images in a layout that is known. Expected{TREES.format(root)}\nFound {found}."
        )
    check_owners(records)
    return records


def products(root: Path, deepest: int = 1) -> list[Path]:
    """The folders of products: `root` itself, or those in it, so many folders deep at most."""
    if _is_product(root):
        test = _called(root, TEST)
        return [folder for folder in _folders(test) if _called(folder, NORMAL)] or [root] if test else [root]
    if not deepest:
        return []
    within = [folder for folder in _folders(root) if _word(folder) not in (*TRAIN, *MASKS) or _called(folder, NORMAL)]
    return [product for folder in within for product in products(folder, deepest - 1)]


def _is_product(folder: Path) -> bool:
    words = {_word(inside) for inside in _folders(folder)}
    splits_and_kinds, pairs = (*TEST, *NORMAL, *ANOMALOUS), (PICTURES, MASKS)
    return not words.isdisjoint(splits_and_kinds) or not any(words.isdisjoint(names) for names in pairs)


def has_test_split(folder: Path) -> bool:
    """Whether a product's images lie in a test split."""
    return _called(folder, TEST) is not None


def _product_records(root: Path, folder: Path, class_name: str) -> Iterator[Record]:
    """The test split of a product where it has one, else its normal and its anomalous images."""
    test = _called(folder, TEST)
    masks = _mask_folder(folder) or (_mask_folder(test) if test else None)
    normal, anomalous = _kinds(test or folder, masks, all_others=test is not None)
    for kind in normal:
        for images in _picture_folders(kind, ANOMALOUS):
            for image in _images_and_masks(images, None)[0]:
                yield Record(image.relative_to(root).as_posix(), 0, class_name)
    for kind in anomalous:
        for images in _picture_folders(kind, NORMAL):
            yield from _anomalous_records(root, images, _masks_of(kind, images, masks), class_name)
    if not normal and not anomalous:
        pictures = _called(test or folder, PICTURES) or test
        if pictures:
            yield from _flat_records(root, pictures, masks, class_name)


def _kinds(folder: Path, masks: Path | None, all_others: bool) -> tuple[list[Path], list[Path]]:
    """Folders of normal images, and of kinds of defects.

    `all_others`: in a test split all that is not normal is a defect. Beside good images may lie anything, but a folder
    of masks that is called as another folder makes that a defect as well.
    """
    normal, anomalous = [], []
    for kind in _folders(folder):
        mirrored = masks is not None and _like(masks, kind.name) is not None
        if _word(kind) in NORMAL:
            normal.append(kind)
        elif kind == masks or (_word(kind) in (*TRAIN, *TEST, *MASKS, *PICTURES) and not mirrored):
            continue
        elif _word(kind) in ANOMALOUS or all_others or mirrored:
            anomalous.append(kind)
    return normal, anomalous


def _anomalous_records(root: Path, folder: Path, masks: Path | None, class_name: str) -> Iterator[Record]:
    """Anomalous images with their masks, from a folder of masks or from beside them."""
    images, found = _images_and_masks(folder, masks)
    for image in images:
        mask = found.get(image) or (masks / f"{image.stem}_mask.png" if masks else None)
        name = mask.relative_to(root).as_posix() if mask else None
        yield Record(image.relative_to(root).as_posix(), 1, class_name, name)


def _flat_records(root: Path, folder: Path, masks: Path | None, class_name: str) -> Iterator[Record]:
    """Images that lie in no folder of a kind; those with a defect in their mask are anomalous.

    Masks lie in a folder of their own, as in DAGM, or beside the images, as in KolektorSDD2 (7.png, 7_GT.png). There
    are no records where nothing has a mask. Raises ValueError for a mask in the folder that is of no image, which
    would pass for normal.
    """
    images, found = _images_and_masks(folder, masks)
    if masks and images and (others := sorted(set(images_in(masks)) - set(found.values()))):
        raise ValueError(
            f"{others[0]}: the mask of no image in {folder}, where masks tell which images are anomalous; "
            f"{len(others)} are. Call them as their images, with _mask behind or without."
        )
    for image in images if found else ():
        name, mask = image.relative_to(root).as_posix(), found.get(image)
        if mask is not None and _has_defect(mask):
            yield Record(name, 1, class_name, mask.relative_to(root).as_posix())
        else:
            yield Record(name, 0, class_name)


def _has_defect(mask: Path) -> bool:
    """Whether a mask shows one; also where it cannot be read, which is found when it shall be used."""
    try:
        return bool(read_mask_pixels(mask).defect.any())
    except ValueError:
        return True


def _images_and_masks(folder: Path, masks: Path | None) -> tuple[list[Path], dict[Path, Path]]:
    """The images of a folder, and {image: its mask}, from the folder of masks or from beside it.

    Raises ValueError where an image has both.
    """
    files = images_in(folder)
    beside = masks_beside(files)
    are_masks = set(beside.values())
    images = [file for file in files if file not in are_masks]
    found = find_masks(images, masks) if masks else {}
    for image in beside:
        if image in found:
            raise ValueError(f"{image}: is its mask {found[image]} or {beside[image]}? Keep one of them.")
    return images, {image: mask for image, mask in beside.items() if image not in are_masks} | found


def _picture_folders(kind: Path, others: tuple[str, ...], deepest: int = DEEPEST) -> list[Path]:
    """The folders of a kind that have its images: its own and those in it, but for those called as `others`.

    Where its own has none, one called as pictures are is all, as in MVTec 3D-AD, which has depths as well.
    """
    if not images_in(kind) and (pictures := _called(kind, PICTURES)):
        return [pictures]
    within = [folder for folder in _folders(kind) if _word(folder) not in (*MASKS, *TRAIN, *TEST, *others)]
    deeper = [found for folder in within for found in _picture_folders(folder, others, deepest - 1)] if deepest else []
    return [kind, *deeper]


def _mask_folder(folder: Path) -> Path | None:
    """The folder of masks of a product; one that has some, before others that are called so."""
    called = [inside for inside in _folders(folder) if _word(inside) in MASKS]
    return next((inside for inside in called if _has_images(inside)), None)


def _masks_of(kind: Path, images: Path, masks: Path | None) -> Path | None:
    """Where the masks of images in a folder of a kind lie: within it, in a folder called as it is, or all in one."""
    if own := _called(images, MASKS) or _called(kind, MASKS):
        return own
    if masks is None:
        return None
    below = _like(masks, kind.name)
    for part in images.relative_to(kind).parts:
        below = (below and _like(below, part)) or below
    found = below or _like(masks, images.name) or (masks if images_in(masks) else None)
    return found or masks / kind.name


def unread(root: Path, records: list[Record]) -> list[str]:
    """A line for each folder with images that no record names, but for those of train splits, or with other files."""
    known = {path for record in records for path in (record.image_path, record.mask_path) if path}
    found: Counter[Path] = Counter()
    lines = []
    for place, folders, files in os.walk(root):
        split = any(_word(Path(name)) in TEST for name in folders)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (split and _word(Path(name)) in TRAIN)
        )
        relative = Path(place).relative_to(root)
        if relative.as_posix() in known or _is_of_normal_masks(relative):
            continue  # several masks of one image, or masks that nobody needs
        images = [Path(place, name) for name in files if is_image(Path(name))]
        masks = set(masks_beside(images).values())
        for image in images:
            if image not in masks and image.relative_to(root).as_posix() not in known:
                found[relative] += 1
        others = [name for name in files if not is_image(Path(name)) and not name.startswith(".")]
        others = sorted({name for name in others if Path(name).suffix.lower().lstrip(".") not in DOCUMENTS})
        if images and others:
            names = named_few(others, most=3)
            lines.append(f"{len(others)} files in {relative.as_posix()} are no images by their names: {names}")
    return [f"{count} {_why_unread(root, place)}" for place, count in found.items()] + lines


def _is_of_normal_masks(place: Path) -> bool:
    return _word(place) in NORMAL and any(_word(above) in MASKS for above in place.parents)


def _why_unread(root: Path, place: Path) -> str:
    above = [place, *place.parents]
    if any(_word(part) in MASKS for part in above):
        return f"masks in {place.as_posix()} are of no image."
    words = f"images in {place.as_posix()} are not read: "
    if not any(_word(part) in TEST for part in above) and any(_called(root / part, TEST) for part in above):
        return f"{words}the test split beside them is."
    return f"{words}no folder above them says whether they are good or bad."


def _has_images(folder: Path) -> bool:
    return any(is_image(Path(name)) for _, _, files in os.walk(folder) for name in files)


def _like(folder: Path, name: str) -> Path | None:
    """A folder in a folder that is called so, or so but for case, - and spaces."""
    exact = folder / name
    return exact if exact.is_dir() else _called(folder, (_word(exact),))


def _called(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first folder in a folder that is called as one of the names."""
    return next((inside for inside in _folders(folder) if _word(inside) in names), None)


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones and links to one that they lie in."""
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in inside if not _leads_back(path))


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _word(folder: Path) -> str:
    return plain_name(folder.name).replace("-", "_").replace(" ", "_")
