"""Image and mask files, read as people see them, and checked."""

import math
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dataset.records import Record

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".jp2", ".j2k", ".pgm", ".ppm", ".pbm", ".pnm"),
)
# What is tried, whatever a file is called: others are no photographs, have decoders that few test, or, as EPS, start
# another program.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "PPM")
Image.init()  # else Pillow knows only some of them
# Pixels that are converted at a time, so that what lies between takes little memory.
BAND = 1 << 22
# Pixels of an image at most; of one bit each, they fit into a file of a few bytes. Telephones take up to 108 million.
MOST_PIXELS = 128_000_000
# Holds another number, for this process and those that it starts.
MOST_PIXELS_VARIABLE = "AACLIP_MAX_PIXELS"
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # whose limit is less
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of what is odd in a file and not needed
# Larger images are decoded one after the other, whatever the number of threads.
LARGE, one_large = 32_000_000, threading.Lock()
# Threads that read files at most; each has an image in memory.
MOST_THREADS = 8
# Bits that cameras and scanners have.
DEPTHS = (8, 10, 12, 14, 16)
# Masks whose brightest value is less hold numbers of labels.
DARK = 96
# Values of a mask that is no longer one of a few labels.
MANY = 8

# EXIF's orientations, in the order of their numbers from 2 on.
TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name, and not hidden, as what systems write beside photographs is."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def images_in(folder: Path) -> list[Path]:
    """The images of a folder by name; of none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(filter(is_image, folder.iterdir()))


def read_image(path: Path, bits: int = 16, reduced_to: int | None = None) -> Image.Image:
    """An RGB image as a viewer shows it: turned by its EXIF orientation, 16 bits scaled to 8, transparent over white.

    `bits` of the values, if the file has 16 of them. `reduced_to`: a JPEG file is decoded at 1/8, 1/4 or 1/2 of its
    size, if both sides keep at least so many px. Raises ValueError where the file cannot be decoded, or its values have
    more bits.
    """
    with _opened(path, "an image") as image:
        _reduce(image, reduced_to)
        if bits < 16 and _is_deep_colour(image):
            return _deep_colour_to_rgb(path, image, bits)
        return as_rgb(image, bits)


def at_model_size(image: Image.Image, img_size: int) -> Image.Image:
    """An image as a square of the size of the model's input, px; one that has it already stays as it is."""
    return image.resize((img_size, img_size), Image.Resampling.BICUBIC)


def reduced_for(img_size: int) -> int:
    """The `reduced_to` of images for a model that takes `img_size` px: twice as many, see docs/data.md."""
    return 2 * img_size


def take_pixels(most: int) -> None:
    """Read images of up to so many pixels from now on."""
    os.environ[MOST_PIXELS_VARIABLE] = str(most)
    if Image.MAX_IMAGE_PIXELS is not None and most > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most  # else Pillow refuses them


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """A file as Pillow opens it; what goes wrong within is a ValueError: not readable as `kind`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels, most = image.width * image.height, int(os.environ.get(MOST_PIXELS_VARIABLE, MOST_PIXELS))
            if pixels > most:
                size = f"{image.width} x {image.height} px"
                raise ValueError(f"{size}, expected at most {most:,} pixels; --max_pixels takes more")
            with one_large if pixels > LARGE else nullcontext():
                yield image
    except Exception as error:  # decoders raise what they like for broken files, AssertionError and IndexError too
        reason = "out of memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of the formats that are read: {', '.join(FORMATS)}"
        if isinstance(error, Image.DecompressionBombError):
            reason = "too many pixels; --max_pixels takes more"
        raise ValueError(f"{path}: not readable as {kind} ({shorten(reason, 160)}).") from error


def _reduce(image: Image.Image, reduced_to: int | None) -> None:
    """Have a JPEG file that was just opened decoded at the smallest size that `read_image` allows."""
    if reduced_to is None:
        return
    width, height = image.size
    for scale in (8, 4, 2):
        # Of other sides the last row would hold less than the others, which moves the image against its mask.
        if min(width, height) >= scale * reduced_to and width % scale == height % scale == 0:
            image.draft(None, (width // scale, height // scale))  # which leaves other formats alone
            return


def as_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
    """The same of an image that is open; of one with colours of 16 bits the highest 8 count. Raises ValueError."""
    found = _to_rgb(_turned(image), "white", bits)
    if found is not image:
        found.info = {}  # what the file says of itself would have the image turned again, by whoever gets it
    return found


def _orientation(image: Image.Image) -> int:
    """How a file that was just opened is to be turned, 1 to 8 as EXIF counts."""
    # Pillow looks for late EXIF data of a PNG by decoding it, which would make a look at the header slow.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.format == "TIFF":  # Pillow turns it itself, but scrambles an uncompressed one by a quarter turn (13.0)
        if orientation in (5, 6, 7, 8):
            raise ValueError("a TIFF file that its EXIF data turn by a quarter; save it upright, or as a PNG file")
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turned(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also writes the EXIF data anew, which fails on the tags of some photographs.
    orientation = _orientation(image)
    return image.transpose(TURNS[orientation - 2]) if orientation > 1 else image


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether a file that was just opened has colours of 16 bits, of which Pillow gives the highest 8."""
    return image.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _deep_colours(path: Path) -> np.ndarray:
    """The values [height, width, 3 or 4] of colours of 16 bits, red first."""
    found = cv2.imdecode(np.frombuffer(path.read_bytes(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16 or found.ndim != 3:
        raise ValueError("its colours of 16 bits cannot be read; save it as PNG, or give --bits 16")
    return found[..., [2, 1, 0, 3][: found.shape[2]]]


def _deep_colour_to_rgb(path: Path, image: Image.Image, bits: int) -> Image.Image:
    orientation = _orientation(image)
    if image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        raise ValueError("a TIFF file with colours of 16 bits that its EXIF data turn; save it upright")
    found = Image.fromarray(_scaled(_deep_colours(path), bits))
    if orientation > 1:
        found = found.transpose(TURNS[orientation - 2])
    return _to_rgb(found, "white", bits)


def _scaled(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of so many bits as ones of 8."""
    most = 2**bits - 1
    if values.max(initial=0) > most:
        raise ValueError(f"it has values up to {values.max()}, which are more than {bits} bits; give another --bits")
    return (values / (most / 255)).round().astype(np.uint8)


def brightest(path: Path) -> int | None:
    """The highest value in an image file of 16 bits, None for one of 8. Raises ValueError if unreadable."""
    with _opened(path, "an image") as image:
        if image.mode.startswith("I"):
            return int(_of_16_bits(image).max(initial=0))
        return int(_deep_colours(path)[..., :3].max(initial=0)) if _is_deep_colour(image) else None


def pages(path: Path) -> int:
    """How many pictures a file holds, of which the first is read. Raises ValueError if unreadable."""
    with _opened(path, "an image") as image:
        # Not of photographs, in which telephones hide a second picture.
        return getattr(image, "n_frames", 1) if image.format in ("TIFF", "GIF", "PNG", "WEBP") else 1


def bits_for(value: int) -> int:
    """The fewest bits, of those that cameras have, that a value has room in."""
    return next(bits for bits in DEPTHS if value < 2**bits)


def _to_rgb(image: Image.Image, background: str, bits: int = 16) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected whole numbers of 8 or 16 bits")
    if image.width * image.height <= BAND:
        return _band_to_rgb(image, background, bits)
    found = Image.new("RGB", image.size)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        found.paste(_band_to_rgb(band, background, bits), (0, top))
    return found


def _band_to_rgb(image: Image.Image, background: str, bits: int) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion would cut at 255
        image = Image.fromarray(_scaled(_of_16_bits(image), bits))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _of_16_bits(image: Image.Image) -> np.ndarray:
    """The values of whole numbers. Raises ValueError where they have more bits."""
    values = np.asarray(image)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError("its pixels are numbers of 32 bits; expected 8 or 16 bits")
    return values


class MaskPixels(NamedTuple):
    """Which pixels of a mask are defect, [height, width]; `cut`: those brighter than half, as of a lossy file.

    `grey`: it has many values, so that it may be lossy though it does not show it by itself.
    """

    defect: np.ndarray
    cut: bool
    grey: bool


def read_mask_pixels(path: Path, lossy: bool = False) -> MaskPixels:
    """The pixels of a mask: what is not black is defect (transparent pixels are black), where it is not `is_lossy`.

    `lossy`: many masks of the data set are, so that one that is grey is as well. Of a folder the masks in it count
    together. Raises ValueError if a file is unreadable.
    """
    if path.is_dir():
        return _together(path, [read_mask_pixels(file, lossy) for file in _masks_in(path)])
    with _opened(path, "a mask") as image:
        mask = _turned(image)
        labels, compressed = mask.mode in ("1", "P"), image.format == "JPEG"
        # Masks of 16 bits may be as dark as 1, which scaling to 8 bits would lose. Grey ones, as most are, stay so.
        plain = mask.mode[0] in "IF" or (mask.mode == "L" and not mask.has_transparency_data)
        whole = np.asarray(mask) if plain else np.asarray(_to_rgb(mask, "black")).max(axis=-1)
    values = whole
    if values.dtype != np.uint8:
        bright = DARK * 257 <= values.max(initial=0) <= 65535 and values.min(initial=0) >= 0
        values = (values / 257).astype(np.uint8) if bright else np.zeros_like(values, dtype=np.uint8)
    grey = not labels and values.max(initial=0) >= DARK and np.count_nonzero(_counts(values)) >= MANY
    # A JPEG file of few or dark labels would be no mask; of a tiny defect it may not tell by its values.
    cut = values.max(initial=0) >= DARK if compressed else grey and (lossy or is_lossy(values))
    return MaskPixels(whole > whole.max() / 2 if cut else whole != 0, bool(cut), bool(grey))


def _masks_in(folder: Path) -> list[Path]:
    """The masks of one image in a folder. Raises ValueError where there is none."""
    if found := images_in(folder):
        return found
    raise ValueError(f"{folder}: not readable as a mask (a folder without images).")


def _together(folder: Path, masks: list[MaskPixels]) -> MaskPixels:
    if len({mask.defect.shape for mask in masks}) != 1:
        raise ValueError(f"{folder}: not readable as a mask (expected masks of one size in it, found {len(masks)}).")
    defect = np.logical_or.reduce([mask.defect for mask in masks])
    return MaskPixels(defect, any(mask.cut for mask in masks), any(mask.grey for mask in masks))


def _counts(values: np.ndarray) -> np.ndarray:
    """How many pixels have each brightness, [256], of an array of uint8."""
    return np.array(Image.fromarray(values).histogram())  # several times as quick as NumPy's bincount


def is_lossy(values: np.ndarray) -> bool:
    """Whether the brightness 0 to 255 of a mask's pixels is that of two values, blurred by compression or resizing.

    It then crowds at both ends, with neighbours of black and of the brightest value, and little between. Numbers of
    labels are few, or dark, or stand alone.
    """
    counts = _counts(values)
    top = int(values.max(initial=0))
    ends, between = top / 8, counts[math.ceil(top / 4) : math.floor(top * 3 / 4) + 1].sum()
    beside_black = counts[1 : math.floor(ends) + 1].any()
    beside_top = counts[math.ceil(top - ends) : top].any()
    return bool(
        top >= DARK
        and np.count_nonzero(counts) >= MANY
        and beside_black
        and beside_top
        and between < counts[math.floor(top * 3 / 4) + 1 :].sum()
    )


def read_defect(path: Path, lossy: bool = False) -> MaskPixels:
    """The mask of an anomalous image; `lossy` as in `read_mask_pixels`.

    Raises ValueError where it is unreadable or has no defect in it.
    """
    mask = read_mask_pixels(path, lossy)
    if not mask.defect.any():
        raise ValueError(
            f"{path}: the mask of an anomalous image is empty; mend it, or leave mask_path out of its line."
        )
    return mask


def read_record(folder: Path, record: Record) -> tuple[Image.Image, Image.Image | None]:
    """The image of a record and its mask, None where it has none. Raises ValueError for what is wrong with them."""
    image, mask = read_pixels(folder, record)
    return image, None if mask is None else Image.fromarray(mask.defect.astype(np.uint8) * 255)


def read_pixels(folder: Path, record: Record) -> tuple[Image.Image, MaskPixels | None]:
    """The same, of the mask what `read_mask_pixels` gives."""
    image = read_image(folder / record.image_path, record.bits, record.reduced_to)
    if record.mask_path is None:
        return image, None
    path = folder / record.mask_path
    mask = read_defect(path, record.lossy)
    _check_shapes(path, image.size, mask.defect.shape[::-1])
    return image, mask


def _check_shapes(path: Path, image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Raise ValueError where the mask of `path` lies across its image; one merely smaller or larger still fits."""
    if image != mask and image == mask[::-1]:
        raise ValueError(
            f"{path}: is {mask[0]} x {mask[1]} px, and its image, turned by its EXIF orientation, "
            f"{image[0]} x {image[1]}. Turn one of them."
        )


def size_on_disk(path: Path, reduced_to: int | None = None) -> tuple[int, int]:
    """Width and height in pixels that `read_image` gives, from the header alone. Raises ValueError if unreadable."""
    if path.is_dir():  # of masks of one size
        path = _masks_in(path)[0]
    with _opened(path, "an image") as image:
        _reduce(image, reduced_to)
        return image.size if _orientation(image) < 5 else (image.height, image.width)


def readers() -> ThreadPoolExecutor:
    """Threads to read files with, as many as this machine has processors and memory for."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS))
