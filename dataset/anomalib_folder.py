"""The folders that anomalib's `Folder` is given -> records, with its masks paired as it pairs them."""

import logging
import os
from itertools import islice
from pathlib import Path

from dataset.images import is_image
from dataset.records import Record, check_class, leaves_folder, two_labels

logger = logging.getLogger(__name__)


def folder_records(
    root: Path, normal_dir: list[str], abnormal_dir: list[str], normal_test_dir: list[str], mask_dir: list[str]
) -> list[Record]:
    """Records of the images of a test, of one class that is called as `root`; folders are relative to it.

    Normal ones are those of `normal_test_dir`, since those of `normal_dir` beside it are for training; without it all
    of `normal_dir`, of which anomalib draws some for the test. Folders are read with those within them. Raises
    FileNotFoundError for a folder without images, ValueError where one is outside and where masks do not pair.
    """
    if not normal_dir and not normal_test_dir:
        raise ValueError(f"{root}: expected the folder of good images, --normal_dir or --normal_test_dir; found none.")
    if mask_dir and not abnormal_dir:
        raise ValueError(f"{root}: --mask_dir without --abnormal_dir: expected the folder of the images of the masks.")
    class_name = Path(os.path.abspath(root)).name
    check_class(class_name, str(root))
    train, test = _images(root, "--normal_dir", normal_dir), _images(root, "--normal_test_dir", normal_test_dir)
    if train and test:
        logger.info("%s: the %d images of --normal_dir are for training, and are left out.", root, len(train))
    anomalous, masks = _images(root, "--abnormal_dir", abnormal_dir), _images(root, "--mask_dir", mask_dir)
    if mask_dir:
        _check_pairs(root, anomalous, masks, abnormal_dir, mask_dir)
    records = [Record(image, 0, class_name) for image in test or train]
    mask_of = dict(zip(anomalous, masks, strict=bool(masks)))
    records += [Record(image, 1, class_name, mask_of.get(image)) for image in anomalous]
    if path := next(two_labels(records), None):
        raise ValueError(f"{root}: '{path}' lies in a folder of good images and in one of anomalous ones. Name others.")
    return records


def _images(root: Path, flag: str, folders: list[str]) -> list[str]:
    """The images of folders and of those in them, relative to `root`, each once, by their parts as anomalib sorts."""
    found: set[Path] = set()
    for folder in folders:
        if leaves_folder(folder):
            raise ValueError(f"{flag} {folder}: expected a folder in {root}, by its path from there.")
        inside = (path.relative_to(root) for path in (root / folder).rglob("*") if is_image(path) and path.is_file())
        images = {path for path in inside if not any(part.startswith(".") for part in path.parts)}
        if not images:
            raise FileNotFoundError(f"{flag} {folder}: expected images in {root / folder}, found none.")
        found |= images
    return [path.as_posix() for path in sorted(found)]


def _check_pairs(root: Path, images: list[str], masks: list[str], abnormal_dir: list[str], mask_dir: list[str]) -> None:
    """Raise ValueError at the first image and mask, both in order, that are not each other's.

    Where each folder of images is given one of masks, that counts too: anomalib does not look at it, and would take the
    masks of another kind.
    """
    what_to_do = (
        "anomalib pairs the sorted images with the sorted masks, so give each anomalous image one mask with its name "
        "in it, in folders that sort alike (crack/000.png, mask/crack/000_mask.png), or leave --mask_dir out."
    )
    if len(images) != len(masks):
        alone = (image for image in images if not any(Path(image).stem in Path(mask).stem for mask in masks))
        none = "".join(f", none for '{image}'" for image in islice(alone, 1))
        raise ValueError(
            f"{root}: expected as many masks as anomalous images, {len(images)}, found {len(masks)}{none}: {what_to_do}"
        )
    folders = list(zip(abnormal_dir, mask_dir, strict=True)) if len(abnormal_dir) == len(mask_dir) else [(".", ".")]
    for image, mask in zip(images, masks, strict=True):
        alike = any(Path(image).is_relative_to(one) and Path(mask).is_relative_to(other) for one, other in folders)
        if not alike or Path(image).stem not in Path(mask).stem:
            raise ValueError(f"{root}: expected the mask of '{image}', found '{mask}' in its place: {what_to_do}")
