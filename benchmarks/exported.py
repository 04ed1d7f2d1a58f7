"""An exported model beside the same in PyTorch: seconds per image, how far maps differ, and size.

    python -m benchmarks.exported                        # the demo
    python -m benchmarks.exported --model_name ViT-L-14-336 --img_size 518    # stand-in weights

Medians of one run, in which both take turns; the ratio is that of PyTorch, so less than 1 is faster. For the demo also
the seconds of a whole predict.py of one image, from its start.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.speed import make_model
from benchmarks.standin import standin_backbone
from forward_utils_cross_attention import PromptBank
from model.backbone import Backbone, load_backbone
from model.config import PLACEMENTS, REPOSITORY
from utils.exported import JUDGED, PIXELS, open_session
from utils.exporting.files import data_files, save
from utils.exporting.graph import Judge, to_graph
from utils.exporting.reduced import REDUCED
from utils.judging import Detector

BATCHES = (1, 7)


def make_judge(backbone: Backbone, placement: str) -> Judge:
    """A model with both cross-attentions, all from pixels to scores."""
    model = make_model(backbone, placement, True, True)
    model.set_stage(None)
    detector = Detector.of(model, PromptBank(backbone, {"nut": "nut"}, "industrial"))
    return Judge(detector, detector.text.bank.descriptions, detector.text.bank.domain)


def noise(batch: int, size: int) -> np.ndarray:
    """Images of noise, [batch, size, size, 3]."""
    return np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(judge: Judge, path: Path, repeats: int) -> None:
    """Print what a file weighs, how far its maps differ, and how long both take."""
    session = open_session(path)
    files = [path, *(path.parent / name for name in data_files(path))]
    print(f"  {path.stem}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {len(files)} file(s)")
    for batch in BATCHES:
        pixels = noise(batch, judge.model.backbone.img_size)
        tensor, given = torch.from_numpy(pixels), {PIXELS: pixels}
        expected, (found,) = judge(tensor)[0].numpy(), session.run([JUDGED[0]], given)
        difference = np.abs(found - expected).max() / np.ptp(expected)
        times: list[tuple[float, float]] = []
        for _ in tqdm(range(repeats), desc=f"{path.stem}, batch {batch}", disable=None, leave=False):
            exact = seconds_of(partial(judge, tensor))
            times.append((exact, seconds_of(partial(session.run, list(JUDGED), given))))
        pytorch, exported = (statistics.median(column) / batch for column in zip(*times, strict=True))
        ratio = statistics.median(exported / pytorch for pytorch, exported in times)
        print(
            f"    batch {batch}: PyTorch {pytorch:.4f} s per image, exported {exported:.4f} s, ratio {ratio:.2f}; "
            f"maps differ by {difference:.1e} of their range"
        )


def compare_commands(path: Path, repeats: int) -> None:
    """Print how long predict.py takes for one image, by a trained model and by its exported file."""
    base = REPOSITORY / "ckpt" / "demo" / "base"
    words = ["export.py", "--ckpt", str(base), "--class_name", "nut", "--out", str(path)]
    subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=True, capture_output=True)
    image = next((REPOSITORY / "data" / "demo_train").rglob("*.png"))
    rounds, names = [], {"PyTorch": base, "exported": path}
    for _ in tqdm(range(repeats), desc="predict.py", disable=None, leave=False):
        taken = {}
        for name, ckpt in names.items():
            words = ["predict.py", "--ckpt", str(ckpt), "--class_name", "nut", "--images", str(image)]
            words += ["--save_path", str(path.parent / name)]
            run = partial(subprocess.run, [sys.executable, *words], cwd=REPOSITORY, check=True, capture_output=True)
            taken[name] = seconds_of(run)
        rounds.append(taken)
    pytorch, exported = (statistics.median(taken[name] for taken in rounds) for name in names)
    print(
        f"  predict.py, one image: PyTorch {pytorch:.2f} s, exported {exported:.2f} s, ratio {exported / pytorch:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="demo")
    parser.add_argument("--img_size", type=int)
    parser.add_argument("--cross_attn", default="joint", choices=tuple(PLACEMENTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--also", nargs="*", default=[], choices=tuple(REDUCED), help="smaller files beside it")
    args = parser.parse_args()
    is_demo = args.model_name == "demo"
    backbone = load_backbone("demo", args.img_size) if is_demo else standin_backbone(args.model_name, args.img_size)
    judge = make_judge(backbone, args.cross_attn)
    graph = to_graph(judge)
    threads = torch.get_num_threads()
    print(f"{args.model_name}, {backbone.img_size} px, {args.cross_attn}, {threads} threads, {args.repeats} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fp32", *args.also):
            path = Path(folder) / f"{name}.onnx"
            save(REDUCED[name](graph) if name in REDUCED else graph, path)
            compare(judge, path, args.repeats)
        if is_demo:
            compare_commands(Path(folder) / "demo.onnx", args.repeats)


if __name__ == "__main__":
    main()
