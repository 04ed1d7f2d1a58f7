"""Seconds of the published AA-CLIP's own code beside this program's, on the same weights and images.

    git clone https://github.com/Mwxinnn/AA-CLIP ../AA-CLIP
    python -m benchmarks.published ../AA-CLIP        # ViT-L/14 on stand-in weights, 224 px, batch 2, fp32

It runs the training and test functions of that checkout, of which nothing is copied here. Medians of rounds that take
turns. "base" is this program's model without cross-attention, which computes the same; "extended" has both.
"""

import argparse
import contextlib
import importlib
import io
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.speed import Calls, make_model, measure
from benchmarks.standin import fill_adapters, standin_backbone
from dataset.commands import path_argument
from model.adapter_cross_attention import CrossAttentionCLIP
from model.backbone import Backbone
from model.config import DEFAULT_MODEL, REPOSITORY
from utils.cli import run_script
from utils.options import at_least

URL = "https://github.com/Mwxinnn/AA-CLIP"
# What its modules import, beyond this program's requirements; its tokenizer asks for what newer setuptools lack.
PACKAGES = "kornia pandas ipdb ftfy regex 'setuptools<70'"
# Its modules that are called; they import the others.
CALLED = ("train", "test", "model.clip", "model.model", "model.adapter")
SURGERY_UNTIL_LAYER = 20  # its default
DATASET, CLASS_NAME = "VisA", "candle"


def load_published(checkout: Path) -> dict[str, ModuleType]:
    """{name: module} of those of a checkout that are called.

    Raises ValueError where it is no checkout of AA-CLIP, or where a package is missing.
    """
    missing = [name for name in ("forward_utils.py", "train.py", "model/clip.py") if not (checkout / name).is_file()]
    if missing:
        raise ValueError(
            f"{checkout}: expected a checkout of AA-CLIP, found no {', '.join(missing)}. Get one: git clone {URL}"
        )
    with in_place_of_ours(checkout):
        try:
            return {name: importlib.import_module(name) for name in CALLED}
        except ImportError as error:
            raise ValueError(f"{checkout}: its code needs more ({error}). Install: pip install {PACKAGES}") from error


@contextlib.contextmanager
def in_place_of_ours(checkout: Path) -> Iterator[None]:
    """Modules of the checkout go before this program's of the same names.

    All that importing them changes is taken back: these modules, paths, variables, threads and warnings.
    """
    tops = {path.stem for path in checkout.iterdir()}

    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops}

    ours, paths, variables, threads = take(), sys.path.copy(), os.environ.copy(), torch.get_num_threads()
    # Its folders are no packages by name, so ours would go before them from anywhere on the path.
    sys.path[:] = [str(checkout), *(path for path in paths if Path(path or ".").resolve() != REPOSITORY)]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        take()
        sys.modules.update(ours)
        sys.path[:] = paths
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(threads)


class StepDone(Exception):  # noqa: N818, which is no error
    """Ends a published loop after one step, before it saves anything."""


class OneBatch:
    """A loader of one batch; `seconds` is how long the step on it took, until the next batch was asked for."""

    def __init__(self, batch: dict[str, Any]):
        self.batch, self.seconds = batch, float("nan")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        started = time.perf_counter()
        yield self.batch
        self.seconds = time.perf_counter() - started
        raise StepDone


class Published:
    """The published model with the weights of `base`, and its own functions on the images of `calls`."""

    def __init__(self, modules: dict[str, ModuleType], calls: Calls, base: CrossAttentionCLIP):
        self.modules, self.images, self.device = modules, calls.images, calls.backbone.device
        self.size, self.clip = calls.backbone.img_size, self._clip(calls.backbone)
        self.surgery = self._clip(calls.backbone)
        self.surgery.visual.DAPM_replace(DPAM_layer=SURGERY_UNTIL_LAYER)
        self.surgery.to(self.device)
        self.model = modules["model.adapter"].AdaptedCLIP(self.clip, relu=False).to(self.device).eval()
        for name in ("text_adapter", "image_adapter"):
            getattr(self.model, name).load_state_dict(getattr(base, name).state_dict())
        self.batch = {
            "image": calls.images,
            "mask": calls.batch["mask"],
            "label": calls.batch["label"],
            "class_name": calls.classes,
            "file_name": calls.classes,
        }
        with torch.no_grad():
            self.anchors = modules["train"].get_adapted_text_embedding(self.model, DATASET, self.device)

    def _clip(self, backbone: Backbone) -> Any:
        config = self.modules["model.clip"].get_model_config(backbone.model_name)
        config["vision_cfg"]["image_size"] = backbone.img_size
        clip = self.modules["model.model"].CLIP(**config)
        clip.load_state_dict(backbone.clip.state_dict(), assign=True)  # the same memory
        return clip.to(self.device).eval()

    def plain(self) -> float:
        """Seconds of the plain CLIP's forward."""
        with torch.no_grad():
            return measure(lambda: self.clip.encode_image(self.images, []), self.device)[0]

    def stage1(self) -> float:
        """Seconds of a step of Stage 1."""
        return self._train("text", clip_surgery=self.surgery, text_norm_weight=0.1, dataset_name=DATASET)

    def stage2(self) -> float:
        """Seconds of a step of Stage 2."""
        return self._train("image", text_embeddings=self.anchors)

    def evaluation(self) -> float:
        """Seconds of maps and scores of one batch, of one class, as it asks for."""
        loader = OneBatch(self.batch | {"class_name": [CLASS_NAME] * len(self.images)})
        with torch.no_grad():
            return self._until_done(
                loader,
                self.modules["test"].get_predictions,
                model=self.model,
                class_text_embeddings=self.anchors[CLASS_NAME],
                test_loader=loader,
                dataset=DATASET,
            )

    def _train(self, stage: str, **given: Any) -> float:
        optimizer = torch.optim.Adam(getattr(self.model, f"{stage}_adapter").parameters(), lr=1e-6, betas=(0.5, 0.999))
        given["adapted_model" if stage == "text" else "model"] = self.model
        if stage == "image":
            given["scheduler"] = torch.optim.lr_scheduler.MultiStepLR(optimizer, [16000])
        loader = OneBatch(self.batch)
        return self._until_done(
            loader,
            getattr(self.modules["train"], f"train_{stage}_adapter"),
            train_loader=loader,
            optimizer=optimizer,
            start_epoch=0,
            save_path="",  # it does not come so far
            logger=logging.getLogger("published"),
            **{f"{stage}_epoch": 1},
            **given,
        )

    def _until_done(self, loader: OneBatch, run: Callable, **given: Any) -> float:
        """Seconds of the step of `run` on the loader's batch, its progress bar not shown."""
        with contextlib.suppress(StepDone), contextlib.redirect_stderr(io.StringIO()):
            run(**given, device=self.device, img_size=self.size)
        return loader.seconds


def contenders(modules: dict[str, ModuleType], calls: Calls) -> dict[str, dict[str, Callable[[], float]]]:
    """{what: {whose: seconds of one call}}."""
    base, extended = (make_model(calls.backbone, "joint", on, on).to(calls.backbone.device) for on in (False, True))
    fill_adapters(base)
    published = Published(modules, calls, base)

    def timed(run: Callable[[], None]) -> Callable[[], float]:
        return lambda: measure(run, calls.backbone.device)[0]

    def all_of(theirs: Callable[[], float], ours: Callable[[CrossAttentionCLIP], Callable[[], None]]) -> dict:
        return {"published": theirs, "base": timed(ours(base)), "extended": timed(ours(extended))}

    return {
        "plain image forward": {"published": published.plain, "base": timed(calls.plain)},
        "Stage 1 step": all_of(published.stage1, lambda model: calls.step(model, "text", "frozen", "last")),
        "Stage 2 step": all_of(published.stage2, lambda model: calls.step(model, "image")),
        "evaluation forward": all_of(published.evaluation, calls.evaluation),
    }


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="CHECKOUT", type=path_argument, help=f"folder of a clone of {URL}")
    parser.add_argument("--img_size", type=at_least(14), default=224)
    parser.add_argument("--batch_size", type=at_least(1), default=2)
    parser.add_argument("--repeats", type=at_least(1), default=5, help="rounds; one more warms up")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    modules = load_published(args.checkout)
    backbone = standin_backbone(DEFAULT_MODEL, args.img_size).to(args.device)
    runs = contenders(modules, Calls(backbone, args.batch_size))
    found: dict[tuple[str, str], list[float]] = {(what, whose): [] for what in runs for whose in runs[what]}
    # Round after round, so that a machine that slows down does so for all.
    for _ in tqdm(range(args.repeats + 1), desc="rounds", disable=None):
        for what, whose in found:
            found[what, whose].append(runs[what][whose]())
    seconds = {key: statistics.median(values[1:]) for key, values in found.items()}
    print(f"{DEFAULT_MODEL}, {args.img_size} px, batch {args.batch_size}, fp32, {args.device}, {args.repeats} rounds")
    for (what, whose), value in seconds.items():
        print(f"  {what:20}  {whose:9}  {value:8.3f} s  {value / seconds[what, 'published']:5.2f} of published")


if __name__ == "__main__":
    run_script(main)
