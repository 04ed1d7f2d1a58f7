"""A folder of images and masks at a model's size, made while they are read and as long as their files stay as they are.

One archive of NumPy for each image: `image` [S, S, 3] and, where it has one, `mask` [S, S], 0 or 255, uint8, beside
`stamps`, what tells that the files are those that it was made of.
"""

import hashlib
import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from dataset.files import check_place, replacing
from dataset.images import images_in, read_record
from dataset.records import Record
from dataset.transforms import Transform

logger = logging.getLogger(__name__)

FLAG = "--resized_images"
# To be raised when files are read or resized to other pixels than before.
VERSION = 1

Pair = tuple[Image.Image, Image.Image | None]


class ResizedImages:
    """Images and masks of the data set in `folder`, resized to `img_size` px, which `place` keeps.

    Several programs, and the processes that read for them, may share a place. Raises ValueError or OSError for one that
    is no folder, or cannot be made.
    """

    def __init__(self, place: Path, folder: Path, img_size: int):
        self.place, self.folder, self.transform = place, folder, Transform(img_size)
        # Whether a file could not be written, in shared memory: one process says so for all.
        self.failed = torch.zeros(1, dtype=torch.bool).share_memory_()
        if not place.is_dir():  # one that is there may be read alone
            check_place(place, FLAG)
            place.mkdir(parents=True, exist_ok=True)

    def serves(self, transform: Transform) -> bool:
        """Whether a transform makes the same of resized images as of those in the files."""
        return transform.takes_resized and transform.img_size == self.transform.img_size

    def read(self, record: Record) -> Pair:
        """The image of a record and its mask, None where it has none. Raises ValueError as `read_record`."""
        try:  # before the files are read, so that what changes meanwhile is seen later
            stamps = self._stamps(record)
        except OSError:  # which reading puts in words
            return read_record(self.folder, record)
        path = self._path(record)
        found = self._stored(path, stamps)
        if found is None:
            found = self.transform.resize(*read_record(self.folder, record))
            self._store(path, stamps, found)
        return found

    def _files(self, record: Record) -> list[Path]:
        """The files that a record is read from; a mask may be a folder of them."""
        image, mask = self.folder / record.image_path, self.folder / (record.mask_path or "")
        if record.mask_path is None:
            return [image]
        return [image, *(images_in(mask) if mask.is_dir() else [mask])]

    def _stamps(self, record: Record) -> np.ndarray:
        """Bytes and time of change in ns of each file of a record, [files, 2]."""
        status = [os.stat(path) for path in self._files(record)]
        return np.array([(found.st_size, found.st_mtime_ns) for found in status], dtype=np.int64)

    def _path(self, record: Record) -> Path:
        """Where a record is kept: of other sizes, or read in another way, it is elsewhere."""
        files = [os.path.abspath(self.folder), record.image_path, record.mask_path]
        how = [self.transform.img_size, record.bits, record.lossy, record.reduced_to, VERSION, PIL.__version__]
        return self.place / f"{hashlib.sha256(json.dumps([*files, *how]).encode()).hexdigest()[:32]}.npz"

    def _stored(self, path: Path, stamps: np.ndarray) -> Pair | None:
        """What a file keeps; None where it is not there, damaged, or made of other files."""
        side = self.transform.img_size
        try:
            with np.load(path, allow_pickle=False) as file:
                if not np.array_equal(file["stamps"], stamps):
                    return None
                image, mask = file["image"], file.get("mask")
        except Exception:  # damaged archives raise what they like
            return None
        if (image.shape, image.dtype) != ((side, side, 3), np.uint8):
            return None
        if mask is not None and (mask.shape, mask.dtype) != ((side, side), np.uint8):
            return None
        return Image.fromarray(image), None if mask is None else Image.fromarray(mask)

    def _store(self, path: Path, stamps: np.ndarray, pair: Pair) -> None:
        """Write what was resized; say once where that fails, and write no more."""
        if self.failed.item():
            return
        arrays = {
            name: np.asarray(part) for name, part in zip(("image", "mask"), pair, strict=True) if part is not None
        }
        content = io.BytesIO()  # NumPy's own errors of writing do not say that a disk is full
        np.savez(content, stamps=stamps, **arrays)  # type: ignore[arg-type]
        try:
            with replacing(path) as file:
                file.write(content.getbuffer())
        except OSError as error:
            if not self.failed.item():
                self.failed.fill_(True)
                logger.warning(
                    "%s %s: cannot be written to (%s). Images that are not in it are read from their own files.",
                    FLAG,
                    self.place,
                    error.strerror,
                )
