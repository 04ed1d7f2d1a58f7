"""What opening a data set needs and does not make itself: the rendered images of the demo, and lists of known sets."""

import logging
from pathlib import Path

from dataset.constants import DATA_SETS
from dataset.demo.build import DEMO_SETS, build
from dataset.files import check_place
from dataset.records import Record, check_paths, write_records
from dataset.sets import FULL, Place, canonical_name, find_dataset, is_path, list_folder, metadata_folder

logger = logging.getLogger(__name__)


def prepare(name: str, data_root: str | Path, follow_links: bool = False) -> None:
    """Render a demo set, or write the list of a known data set, where that is missing; arguments as in `open_dataset`.

    Where no list can be written, that is said, and opening reads the folders. Nothing is made for own folders, which
    are read anew each time. Raises, before anything is written, FileNotFoundError where there is no such data set or a
    file of it is missing, ValueError for what is wrong in it.
    """
    source, root = canonical_name(name), Path(data_root)
    if source in DEMO_SETS and not is_path(name) and not (root / source).is_dir():
        check_place(root, "--data_root")
        build(source, root)
        return
    place = find_dataset(name, root)
    if place.metadata or place.source not in DATA_SETS:
        return
    records = list_folder(place)
    check_paths(records, place.folder, follow_links)
    try:
        path = write_metadata(place, records)
    except OSError as error:  # it can be opened all the same
        logger.info("%s: no list of it could be written (%s); its folders are read each time.", source, error)
    else:
        logger.info("%s: wrote %s, %d images of its official layout.", source, path, len(records))


def write_metadata(place: Place, records: list[Record]) -> Path:
    """Write the full list of a known data set into its folder, or into dataset/metadata where that is read-only.

    Raises ValueError where an older list in the folder cannot be replaced.
    """
    path = place.folder / FULL
    try:
        write_records(path, records)
    except OSError as error:
        if path.is_file():
            raise ValueError(f"{path} cannot be replaced ({error.strerror}), and it would go before others.") from error
        logger.info("%s cannot be written (%s).", path, error.strerror)
        path = metadata_folder(place.source) / FULL
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, records)
    return path
