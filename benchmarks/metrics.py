"""What the metrics cost: time per image beside the forward pass, and memory over many images.

    python -m benchmarks.metrics

Maps are synthetic, two models at a time, as in a comparison with the base. The forward pass is that of the real
architecture on stand-in weights.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.speed import cases, peak_memory, reset_peak_memory
from benchmarks.standin import standin_backbone
from dataset.loading import Batch
from forward_utils_cross_attention import Prediction
from utils.testing.bootstrap import resample
from utils.testing.metrics import ClassScores, Sample, find_defects

MODELS = 2
DEVICE = torch.device("cpu")


def synthetic(rng: np.random.Generator, size: int, number: int) -> tuple[Batch, list[Prediction]]:
    """A batch of one image, every other one with three defects, and the predictions of MODELS models."""
    mask = torch.zeros(1, 1, size, size)
    if number % 2:
        for top, left in rng.integers(0, size - size // 8, (3, 2)):
            mask[0, 0, top : top + size // 10, left : left + size // 8] = 1
    maps = [torch.from_numpy(rng.normal(0, 3, (1, size, size)).astype(np.float32)) for _ in range(MODELS)]
    scores = torch.from_numpy(rng.random(1).astype(np.float32))
    batch = Batch(
        image=torch.empty(0),  # metrics do not look at it
        mask=mask,
        label=torch.tensor([number % 2]),
        has_mask=torch.tensor([True]),
        emptied=torch.tensor([False]),
        class_name=["synthetic"],
        path=[f"{number:06}.png"],
    )
    return batch, [Prediction(one + mask[0], scores, scores) for one in maps]


def add(kept: list[ClassScores], batch: Batch, found: list[Prediction]) -> None:
    """Take in a batch, as `utils.testing.measure` does."""
    defects = [find_defects(mask.numpy()) for mask in batch["mask"].squeeze(1)]
    for scores, prediction in zip(kept, found, strict=True):
        scores.add(prediction, batch, [0], defects, len(scores.numbers))


def finish(kept: list[ClassScores]) -> list[Sample]:
    """Metrics and resamples of a class."""
    samples = [scores.sample() for scores in kept]
    for scores, sample in zip(kept, samples, strict=True):
        scores.metrics(sample)
    resample(samples, (0,))
    return samples


def seconds_per_image(size: int, images: int) -> tuple[float, float]:
    """Median seconds to take in an image, for MODELS models; seconds at the end of a class of `images`."""
    rng = np.random.default_rng(0)
    kept, taken = [ClassScores("industrial") for _ in range(MODELS)], []
    for number in tqdm(range(images), desc="metrics", disable=None):
        batch, found = synthetic(rng, size, number)
        started = time.perf_counter()
        add(kept, batch, found)
        taken.append(time.perf_counter() - started)
    started = time.perf_counter()
    finish(kept)
    return statistics.median(taken), time.perf_counter() - started


def peak_of(size: int, images: int) -> float:
    """Peak memory in MB of a class of so many images, its metrics and resamples."""
    rng = np.random.default_rng(0)
    reset_peak_memory(DEVICE)
    kept = [ClassScores("industrial") for _ in range(MODELS)]
    for number in tqdm(range(images), desc=f"{images} images", disable=None):
        add(kept, *synthetic(rng, size, number))
    finish(kept)
    return peak_memory(DEVICE) * 2**30 / 1e6


def forward_seconds(model_name: str, size: int, repeats: int) -> float:
    """Median seconds of one image's evaluation with both cross-attentions."""
    run = cases(standin_backbone(model_name, size), 1, "joint")["evaluation, both cross-attentions"]
    run()
    taken = []
    for _ in tqdm(range(repeats), desc="forward passes", disable=None):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="ViT-L-14-336")
    parser.add_argument("--img_size", type=int, default=518)
    parser.add_argument("--images", type=int, nargs=2, default=[100, 10_000], help="whose peak memory is compared")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    few, many = args.images
    peaks = [peak_of(args.img_size, few), peak_of(args.img_size, many)]
    per_image, end = seconds_per_image(args.img_size, few)
    forward = forward_seconds(args.model_name, args.img_size, args.repeats)
    metrics = (per_image + end / few) / MODELS
    print(f"{args.model_name}, {args.img_size} px, {MODELS} models, {DEVICE}")
    print(f"  peak memory {peaks[0]:.0f} MB with {few} images, {peaks[1]:.0f} MB with {many}")
    print(
        f"  metrics {1000 * per_image / MODELS:.1f} ms per image and model, and {end:.2f} s at the end of {few} images"
    )
    print(f"  forward {forward:.2f} s per image, metrics in all {metrics / forward:.2%} of it")


if __name__ == "__main__":
    main()
