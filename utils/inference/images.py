"""Which image files are judged: files, folders and patterns of the command line."""

import glob
import logging
import os
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten

from dataset.images import IMAGE_SUFFIXES, is_image, pages
from dataset.survey import found_depth, pages_words
from utils.files import unused_name

logger = logging.getLogger(__name__)


def find_images(given: list[str], results: Path) -> dict[Path, str]:
    """{image file: a name for its results}, from files, folders and patterns.

    What lies in the folder of `results` is taken where its file is named, and not where a folder or a pattern holds it.
    Raises FileNotFoundError for nothing, ValueError where `results` is one of the folders.
    """
    found: dict[Path, str] = {}
    taken: set[str] = set()
    passed_over: list[Path] = []
    own = results.resolve()
    for text in given:
        path = Path(text)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            if path.resolve() == own:
                raise ValueError(
                    f"--save_path {results}: is the folder of --images, where the next call would judge the pictures "
                    "of this one. Choose another folder; it may lie within."
                )
            files, others = images_below(path, own)
            passed_over += others
        else:
            inside = map(Path, glob.glob(text, recursive=True))
            files = sorted(
                file for file in inside if is_image(file) and file.is_file() and own not in file.resolve().parents
            )
        if not files:
            raise FileNotFoundError(
                f"--images {text}: no image there. Files, folders and patterns are understood; of folders and patterns "
                f"{', '.join(IMAGE_SUFFIXES)} are read, but nothing in {results}, where the results go."
            )
        for file in dict.fromkeys(files):
            if file not in found:
                parts = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("").parts
                found[file] = unused_name("_".join(parts), taken)
    if passed_over:
        names = shorten(", ".join(map(str, passed_over)), 200, placeholder=" ...")
        logger.warning("%d files in folders are no images by their names, or lead nowhere: %s", len(passed_over), names)
    return found


def images_below(
    folder: Path, left_out: Path | None, onerror: Callable[[OSError], None] | None = None
) -> tuple[list[Path], list[Path]]:
    """The images in a folder and in those within it, links to folders among them, and the files that are none.

    Hidden files, and those in `left_out`, are neither. `onerror` is told of folders that cannot be listed.
    """
    found, others, seen = list[Path](), list[Path](), set[str]()
    for place, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or real == str(left_out):  # a link may lead back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(place, name) for name in files if not name.startswith(".")):
            (found if is_image(file) and file.is_file() else others).append(file)
    return sorted(found), sorted(others)


def remark(images: list[Path], bits: int) -> None:
    """Say what may not be meant: files of several pages, and images of 16 bits that are all dark."""
    if several := [path for path in images if pages(path) > 1]:
        logger.warning("%s", pages_words(several))
    depth = found_depth(images)
    if depth is not None and depth.usual < bits:
        logger.warning(
            "Images of 16 bits have values up to %d, and are read as of %d bits, so they are dark. If their camera has "
            "%d, give --bits %d.",
            depth.highest,
            bits,
            depth.usual,
            depth.usual,
        )
