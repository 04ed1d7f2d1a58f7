"""All files of a data set are read once before it is used: what is broken is found, and what holds of all is said."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from dataset.images import bits_for, brightest, pages, read_pixels, readers
from dataset.records import Record
from dataset.sets import DataSet

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")
# Names of files in one message.
SHOWN = 5


@dataclass(frozen=True)
class Look:
    """What was seen of one record: what is wrong with it, and what is to be said of its mask and its image.

    `cut` and `resized`: of the mask, see `MaskPixels`, and whether it has another size than the image.
    """

    problem: str | None = None
    cut: bool = False
    resized: bool = False
    pages: int = 1


def surveyed(data: DataSet, bits: int | None, skip_broken: bool) -> DataSet:
    """A data set with the bits of its images, see `with_bits`, and without what is broken, see `survey`."""
    return replace(data, records=survey(data.folder, with_bits(data.folder, data.records, bits), skip_broken))


def survey(folder: Path, records: list[Record], skip_broken: bool = False) -> list[Record]:
    """Read every image and mask, say what is to be said, and give the records that are not broken.

    Raises ValueError that names the first broken file, unless `skip_broken`, and where nothing is left.
    """
    looks = list(_in_threads(lambda record: look_at(folder, record), records, "checking images and masks"))
    for words in remarks(records, looks):
        logger.warning("%s: %s", folder, words)
    broken = [look.problem for look in looks if look.problem]
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
    return Look(cut=mask.cut, resized=mask.defect.shape[::-1] != image.size, pages=held)


def remarks(records: list[Record], looks: list[Look]) -> list[str]:
    """What is said of many files at once."""
    pairs = list(zip(records, looks, strict=True))
    masks = sum(record.mask_path is not None for record in records)
    found = [cut_words(cut, masks)] if (cut := sum(look.cut for look in looks)) else []
    if resized := [record.mask_path for record, look in pairs if look.resized]:
        found.append(
            f"{len(resized)} of {masks} masks have another size than their image, and are stretched to it: "
            f"{named_few(resized)}"
        )
    if several := [record.image_path for record, look in pairs if look.pages > 1]:
        found.append(
            f"{len(several)} images are files of several pages, the first of which is read: {named_few(several)}"
        )
    return found


def cut_words(cut: int, masks: int) -> str:
    """What is said of masks that are cut."""
    return (
        f"{cut} of {masks} masks are grey around their edges, as lossy compression or resizing leaves them; "
        "pixels brighter than half are taken for defect."
    )


def named_few(names: Iterable[object]) -> str:
    """The first names of many."""
    known = [str(name) for name in names]
    return ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")


def with_bits(folder: Path, records: list[Record], bits: int | None, of: list[Record] | None = None) -> list[Record]:
    """The records, to be read with so many bits; None for those of the brightest value among all images `of` their set.

    One depth for all, so that no image is brighter than another only for being alone.
    """
    if bits is None:
        highest = found_brightest([folder / record.image_path for record in of or records])
        bits = 16 if highest is None else bits_for(highest)
        if bits < 16:
            logger.warning(
                "%s: its images of 16 bits have values up to %d, so they are taken for images of %d bits. "
                "--bits says otherwise.",
                folder,
                highest,
                bits,
            )
    return records if bits == 16 else [replace(record, bits=bits) for record in records]


def found_brightest(paths: list[Path]) -> int | None:
    """The highest value in all files of 16 bits, None where all have 8; a file that cannot be read says nothing."""

    def look(path: Path) -> int | None:
        try:
            return brightest(path)
        except ValueError:
            return None

    values = _in_threads(look, paths, "looking for images of 16 bits")
    return max((value for value in values if value is not None), default=None)


def _in_threads(look: Callable[[T], U], things: list[T], title: str) -> Iterator[U]:
    with readers() as pool:
        yield from tqdm(pool.map(look, things), total=len(things), desc=title, leave=False, disable=None)
