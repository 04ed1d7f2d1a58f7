"""Seconds to read, resize and augment one image, beside one image's plain forward pass of the backbone.

    python -m benchmarks.loading                       # ViT-L/14 on stand-in weights, 518 px

Every training step costs more than that pass (see benchmarks.speed), so while reading takes less, one process keeps
up. Photographs of the sizes of VisA (JPEG, 1500 x 1000 px) and MVTec (PNG, 1024 x 1024 px), and a large JPEG. Beneath,
what decoding alone takes in several ways, beside Pillow's way, the file whole. Medians of one run, of ratios too.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from tqdm import tqdm

from benchmarks.standin import standin_backbone, standin_images
from dataset.images import read_image, reduced_for
from dataset.loading import AnomalyDataset, ImageCache
from dataset.records import Record
from dataset.resized import ResizedImages
from dataset.survey import with_reduced_jpeg
from dataset.transforms import AUGMENTATIONS, Transform

FILES = {
    "VisA-like JPEG": (1500, 1000, "jpg"),
    "MVTec-like PNG": (1024, 1024, "png"),
    "large JPEG": (4000, 3000, "jpg"),
}
UNIT, WHOLE = "plain image forward", "Pillow, whole"


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


def decode_by_pillow(path: Path, reduced_to: int | None, seed: int = 0) -> None:
    """A JPEG file, as the program reads it."""
    read_image(path, 16, reduced_to)


def decode_by_torchvision(path: Path, seed: int = 0) -> None:
    """A JPEG file, whole."""
    content = torchvision.io.read_file(str(path))
    torchvision.io.decode_jpeg(content, mode=torchvision.io.ImageReadMode.RGB)


def decoders(path: Path, img_size: int) -> dict[str, Callable[[int], object]]:
    """{what: decodes a JPEG file}, whole and at reduced size; torchvision's decoder where it is built in."""
    ways = {"": None, **{f" to {side} px or more": side for side in (img_size, reduced_for(img_size))}}
    found: dict[str, Callable[[int], object]] = {}
    for ending, reduced_to in ways.items():
        name = f"Pillow, reduced{ending}" if ending else WHOLE
        found[name] = partial(decode_by_pillow, path, reduced_to)
    try:
        decode_by_torchvision(path)
    except (RuntimeError, AttributeError, ImportError):
        return found
    return found | {"torchvision, whole": partial(decode_by_torchvision, path)}


def read_one(dataset: AnomalyDataset, seed: int) -> None:
    """The image of a data set of one."""
    dataset[0, seed]


def transforms(img_size: int) -> dict[str, Transform]:
    """{what takes images: how}."""
    stages = {"Stage 1": "text", "Stage 2": "image"}
    return {"test": Transform(img_size)} | {
        f"{title}, {augment}": Transform(img_size, stage, augment)
        for augment in AUGMENTATIONS
        for title, stage in stages.items()
    }


def cases(folder: Path, img_size: int) -> dict[str, Callable[[int], object]]:
    """{what: reads one image and its mask, augmented by the seed}."""
    found: dict[str, Callable[[int], object]] = {}
    for name, (width, height, suffix) in FILES.items():
        record = write_photograph(folder, name, width, height, suffix)
        resized = ResizedImages(folder / "resized", folder, img_size)
        (reduced,) = with_reduced_jpeg([record], img_size)
        for title, transform in transforms(img_size).items():
            cache = ImageCache(folder, [record], transform)
            cache.fill()
            ways = {
                "file": (record, None),
                "--reduced_jpeg": (reduced, None),
                "--cache_images": (record, cache if transform.augments else None),  # test.py has none
                "--resized_images": (record, resized if resized.serves(transform) else None),
            }
            for way, (read, kept) in ways.items():
                if way == "file" or kept or (read is reduced and suffix == "jpg"):
                    dataset = AnomalyDataset(folder, [read], transform, kept)
                    found[f"{name}, {title}, {way}"] = partial(read_one, dataset)
    return found


def times(runs: dict[str, Callable[[int], object]], repeats: int) -> dict[str, np.ndarray]:
    """{what: seconds of each round}: round after round, so that a machine that slows down does so for all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for seed in tqdm(range(repeats + 1), desc="rounds", disable=None):  # the first warms up
        for name, run in runs.items():
            started = time.perf_counter()
            run(seed)
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


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

    print(f"{args.model_name}, {args.img_size} px, {device}, one process, {args.repeats} rounds")
    with tempfile.TemporaryDirectory() as folder:
        seconds = times({UNIT: forward} | cases(Path(folder), args.img_size), args.repeats)
        for name, values in seconds.items():
            middle, share = np.median(values), np.median(values / seconds[UNIT])
            print(f"  {name:50} {1000 * middle:9.1f} ms {1 / middle:8.1f} images/s  {share:6.1%} of a forward")
        for name in ("VisA-like JPEG", "large JPEG"):
            width, height, suffix = FILES[name]
            seconds = times(decoders(Path(folder, f"{name}.{suffix}"), args.img_size), args.repeats)
            print(f"Decoding a JPEG file of {width} x {height} px")
            for way, values in seconds.items():
                share = np.median(values / seconds[WHOLE])
                print(f"  {way:50} {1000 * np.median(values):9.1f} ms {share:8.2f} of the time of '{WHOLE}'")


if __name__ == "__main__":
    main()
