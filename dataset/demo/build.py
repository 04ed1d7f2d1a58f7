"""The data sets demo_train, demo_dev and demo_test on disk: 12 rendered categories each, in AA-CLIP's format."""

import logging
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from dataset.constants import DATA_SETS
from dataset.demo.products import PRODUCTS
from dataset.demo.render import Rendered, render
from dataset.records import Record, write_records

logger = logging.getLogger(__name__)

DEMO_SETS = ("demo_train", "demo_dev", "demo_test")
IMAGES_PER_CLASS = 100
# Data sets and pre-training draw from seeds of different ranges.
SET_SEED = 2_000_000
# Of the renderer: raise it with every change that alters an image, so that no result comes from older ones.
VERSION = "1"
VERSION_FILE = "renderer_version.txt"


def build(name: str, data_root: Path) -> Path:
    """Render the data set `name` (one of `DEMO_SETS`) into `data_root` and return its folder, laid out as MVTec.

    100 images per category, every other one damaged.
    """
    logger.info("Rendering %s into %s.", name, data_root)
    data_root.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}.half-"
    jobs = [(category, index) for category in DATA_SETS[name].classes for index in range(IMAGES_PER_CLASS)]
    # Renamed when it is whole, so that an interrupted build leaves no half data set behind. A killed one leaves its
    # temporary folder, which the next one, alone under the lock, removes.
    with FileLock(data_root / f".{name}.lock"), tempfile.TemporaryDirectory(prefix=prefix, dir=data_root) as temporary:
        for half in data_root.glob(f"{prefix}*"):
            if half != Path(temporary):
                shutil.rmtree(half)
        if (data_root / name).is_dir():  # another process rendered it meanwhile
            return data_root / name
        folder = Path(temporary) / name
        records = []
        for category, index in tqdm(jobs, desc=name, unit="image", leave=False, disable=None):
            seed = (SET_SEED, list(PRODUCTS).index(category), index)
            records.append(_write(folder, category, index, render(category, index % 2 == 1, seed)))
        write_records(folder / "full-shot.jsonl", records)
        (folder / VERSION_FILE).write_text(VERSION, encoding="utf-8")
        return folder.rename(data_root / name)


def check_version(folder: Path) -> None:
    """Raise ValueError where a folder of the demo's images is not of this renderer."""
    path = folder / VERSION_FILE
    found = path.read_text(encoding="utf-8").strip() if path.is_file() else "unknown"
    if found != VERSION:
        raise ValueError(
            f"{folder}: of renderer version {found}, expected {VERSION}. Move it away; it is rendered again then."
        )


def _write(folder: Path, category: str, index: int, rendered: Rendered) -> Record:
    """Write one image and its mask into a tree like MVTec's."""
    kind = (rendered.defect or "good").replace(" ", "_")
    image_path = f"{category}/test/{kind}/{index:03}.png"
    files = {image_path: rendered.image}
    mask_path = None
    if rendered.defect:
        mask_path = f"{category}/ground_truth/{kind}/{index:03}_mask.png"
        files[mask_path] = rendered.mask
    for path, pixels in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # Not cv2.imwrite, which fails silently, and on paths that are not ASCII under Windows.
        Image.fromarray(pixels).save(folder / path)
    return Record(image_path, int(rendered.defect is not None), category, mask_path)
