"""Seconds to read, resize and augment one image, beside one image's plain forward pass of the backbone.

    python -m benchmarks.loading                       # ViT-L/14 on stand-in weights, 518 px

Every training step costs more than that pass (see benchmarks.speed), so while reading takes less, one process keeps
up. Photographs of the sizes of VisA (JPEG, 1500 x 1000 px) and MVTec (PNG, 1024 x 1024 px). Medians of one run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.standin import standin_backbone, standin_images
from dataset.loading import AnomalyDataset, ImageCache
from dataset.records import Record
from dataset.transforms import AUGMENTATIONS, Transform

FILES = {"VisA-like JPEG": (1500, 1000, "jpg"), "MVTec-like PNG": (1024, 1024, "png")}


def write_photograph(folder: Path, name: str, width: int, height: int, suffix: str) -> Record:
    """An image as smooth and as noisy as a photograph, and its mask."""
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(40, 216, (height // 16, width // 16, 3), dtype=np.uint8), (width, height))
    pixels = np.clip(pixels + rng.normal(0, 2, pixels.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 3 : height // 2, width // 3 : width // 2] = 255
    record = Record(f"{name}.{suffix}", 1, "part", f"{name}_mask.png")
    Image.fromarray(pixels).save(folder / record.image_path, quality=95)
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return record


def read_one(dataset: AnomalyDataset, seed: int) -> None:
    """The image of a data set of one."""
    dataset[0, seed]


def cases(folder: Path, img_size: int) -> dict[str, Callable[[int], None]]:
    """{what: reads one image, augmented by the seed}."""
    found: dict[str, Callable[[int], None]] = {}
    for name, (width, height, suffix) in FILES.items():
        record = write_photograph(folder, name, width, height, suffix)
        for augment in AUGMENTATIONS:
            for stage, title in (("text", "Stage 1"), ("image", "Stage 2")):
                transform = Transform(img_size, stage, augment)
                cache = ImageCache(folder, [record], transform)
                cache.fill()
                for kept, source in ((None, "file"), (cache, "cache")):
                    dataset = AnomalyDataset(folder, [record], transform, kept)
                    found[f"{name}, {title}, {augment}, {source}"] = partial(read_one, dataset)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="ViT-L-14-336")
    parser.add_argument("--img_size", type=int, default=518)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    backbone = standin_backbone(args.model_name, args.img_size).to(device)
    image = standin_images(1, args.img_size).to(device)

    def forward(seed: int) -> None:
        with torch.no_grad():
            backbone.clip.encode_image(image)[0, 0].item()  # which waits for the device

    with tempfile.TemporaryDirectory() as folder:
        runs = {"plain image forward": forward} | cases(Path(folder), args.img_size)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        # Round after round, so that a machine that slows down does so for all; the first warms up.
        for seed in tqdm(range(args.repeats + 1), desc="rounds", disable=None):
            for name, run in runs.items():
                started = time.perf_counter()
                run(seed)
                seconds[name].append(time.perf_counter() - started)
    print(f"{args.model_name}, {args.img_size} px, {device}, one process, {args.repeats} rounds")
    unit = statistics.median(seconds["plain image forward"][1:])
    for name, values in seconds.items():
        middle = statistics.median(values[1:])
        print(
            f"  {name:45} {1000 * middle:9.1f} ms {1 / middle:8.1f} images/s  {100 * middle / unit:6.1f} % of a forward"
        )


if __name__ == "__main__":
    main()
