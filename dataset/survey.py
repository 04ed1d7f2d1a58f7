"""All files of a data set are read once before it is used: what is broken is found, and what holds of all is said."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from dataset.images import MaskPixels, bits_for, brightest, pages, read_pixels, readers, reduced_for
from dataset.records import Record
from dataset.sets import DataSet
from dataset.words import named_few

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")
# Share of masks from which on all grey ones of a data set are cut: of small defects a lossy mask does not show it.
LOSSY = 0.1
# Share of an image above which a defect is doubted.
WHOLE = 0.75


class SeenMask(NamedTuple):
    """Of a mask: whether it is `cut` or `grey`, see `MaskPixels`, and the `share` of it that is defect."""

    name: str
    cut: bool
    grey: bool
    share: float

    @classmethod
    def of(cls, name: str, mask: MaskPixels) -> "SeenMask":
        """What is kept of a mask that was read."""
        return cls(name, mask.cut, mask.grey, mask.defect.mean().item())


@dataclass(frozen=True)
class Look:
    """What was seen of one record: what is wrong with it, its mask and whether that has another size, its pages."""

    problem: str | None = None
    mask: SeenMask | None = None
    resized: bool = False
    pages: int = 1


def surveyed(data: DataSet, bits: int | None, skip_broken: bool) -> DataSet:
    """A data set with the bits of its images, see `with_bits`, and without what is broken, see `survey`."""
    return replace(data, records=survey(data.folder, with_bits(data.folder, data.records, bits), skip_broken))


def survey(folder: Path, records: list[Record], skip_broken: bool = False) -> list[Record]:
    """Read every image and mask, say what is to be said, and give the records that are not broken.

    They say as well whether their masks are lossy. Raises ValueError that names the first broken file, unless
    `skip_broken`, and where nothing is left.
    """
    looks = list(_in_threads(lambda record: look_at(folder, record), records, "checking images and masks"))
    for words in remarks(records, looks):
        logger.warning("%s: %s", folder, words)
    broken = [look.problem for look in looks if look.problem]
    if is_lossy_set([look.mask for look in looks if look.mask]):
        records = [replace(record, lossy=True) for record in records]
    if not broken:
        return records
    if not skip_broken:
        more = f" And {len(broken) - 1} more are broken; --skip_broken leaves them out." if len(broken) > 1 else ""
        raise ValueError(f"{broken[0]}{more}")
    if len(broken) == len(records):
        raise ValueError(f"{folder}: none of its {len(records)} images can be read; the first: {broken[0]}")
    logger.warning(
        "%s: %d of %d images are left out:\n  %s", folder, len(broken), len(records), "\n  ".join(map(str, broken))
    )
    return [record for record, look in zip(records, looks, strict=True) if not look.problem]


def look_at(folder: Path, record: Record) -> Look:
    """Read the image of a record and its mask."""
    try:
        image, mask = read_pixels(folder, record)
        held = pages(folder / record.image_path)
    except ValueError as error:
        return Look(problem=str(error))
    if mask is None:
        return Look(pages=held)
    seen = SeenMask.of(str(record.mask_path), mask)
    return Look(mask=seen, resized=mask.defect.shape[::-1] != image.size, pages=held)


def is_lossy_set(masks: list[SeenMask]) -> bool:
    """Whether so many masks are cut that the grey ones among the others are cut as well."""
    return sum(mask.cut for mask in masks) > LOSSY * len(masks)


def remarks(records: list[Record], looks: list[Look]) -> list[str]:
    """What is said of many files at once."""
    pairs = list(zip(records, looks, strict=True))
    masks = sum(record.mask_path is not None for record in records)
    found = mask_words([look.mask for look in looks if look.mask])
    if resized := [record.mask_path for record, look in pairs if look.resized]:
        found.append(
            f"{len(resized)} of {masks} masks have another size than their image, and are stretched to it: "
            f"{named_few(resized)}"
        )
    if several := [record.image_path for record, look in pairs if look.pages > 1]:
        found.append(pages_words(several))
    return found


def mask_words(masks: list[SeenMask]) -> list[str]:
    """What is said of masks that are grey, or defect nearly all over."""
    cut, grey = sum(mask.cut for mask in masks), sum(mask.grey and not mask.cut for mask in masks)
    found = []
    if cut:
        lossy = is_lossy_set(masks)
        what = "pixels brighter than half are taken for defect."
        if grey and not lossy:
            what = f"of these, {what} Of {grey} others that are grey, all that is not black is."
        found.append(
            f"{cut + grey * lossy} of {len(masks)} masks are grey around their edges, as lossy compression or resizing "
            f"leaves them; {what}"
        )
    if whole := [mask.name for mask in masks if mask.share > WHOLE]:
        found.append(
            f"{len(whole)} of {len(masks)} masks call more than {WHOLE:.0%} of their image a defect: "
            f"{named_few(whole)}. Are they inverted, or no masks?"
        )
    return found


def pages_words(several: Sequence[object]) -> str:
    """What is said of files of several pages."""
    return f"{len(several)} images are files of several pages, the first of which is read: {named_few(several)}"


def with_bits(folder: Path, records: list[Record], bits: int | None) -> list[Record]:
    """The records, to be read with so many bits; None for those of the brightest value in all of them.

    One depth for all, so that no image is brighter than another only for being alone.
    """
    if bits is None:
        depth = found_depth([folder / record.image_path for record in records])
        bits = depth.bits if depth else 16
        if depth and bits < 16:
            logger.warning(
                "%s: its images of 16 bits have values up to %d, so they are taken for images of %d bits. "
                "--bits says otherwise.",
                folder,
                depth.highest,
                bits,
            )
        if depth and depth.usual < bits:
            logger.warning("%s: %s", folder, usual_words(depth))
    return records if bits == 16 else [replace(record, bits=bits) for record in records]


def with_reduced_jpeg(records: list[Record], img_size: int) -> list[Record]:
    """The records, of which large JPEG files are read at reduced size, for a model that takes `img_size` px."""
    return [replace(record, reduced_to=reduced_for(img_size)) for record in records]


class Depth(NamedTuple):
    """Bits of the files of 16 bits among some: of the `highest` value in all, and those that do for half of them."""

    bits: int
    highest: int
    usual: int


def usual_words(depth: Depth) -> str:
    """What is said where few files alone need so many bits."""
    return (
        f"most images of 16 bits have {depth.usual} bits, but one has values up to {depth.highest}, so all are read as "
        f"of {depth.bits}, and most are dark. If that one is a fault, --bits {depth.usual} finds it."
    )


def found_depth(paths: list[Path]) -> Depth | None:
    """The depth of all files of 16 bits, None where all have 8; a file that cannot be read says nothing."""

    def look(path: Path) -> int | None:
        try:
            return brightest(path)
        except ValueError:
            return None

    values = _in_threads(look, paths, "looking for images of 16 bits")
    found = [value for value in values if value is not None]
    return Depth(bits_for(max(found)), max(found), bits_for(int(median(found)))) if found else None


def _in_threads(look: Callable[[T], U], things: list[T], title: str) -> Iterator[U]:
    with readers() as pool:
        yield from tqdm(pool.map(look, things), total=len(things), desc=title, leave=False, disable=None)
