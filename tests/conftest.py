"""A small data set on disk, the demo backbone, and the scripts called as a user calls them."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forward_utils_cross_attention import ClassText, Encoding, encode_sight, see_stage1
from model.adapter_cross_attention import CrossAttentionCLIP, Gated
from model.backbone import Backbone, load_backbone
from model.config import ModelConfig
from utils import checkpoints
from utils.cli import run_script

# Flags of the small training that tests share.
SMALL = ["--dataset", "small", "--model_name", "demo", "--num_workers", "0", "--device", "cpu"]
EPOCHS = ["--text_epoch", "1", "--image_epoch", "1", "--text_batch_size", "4"]


def write_small_dataset(folder: Path, per_kind: int = 5, classes: tuple[str, ...] = ("metal_nut", "candle")) -> Path:
    """`per_kind` normal and anomalous noise images of 48 x 40 px per class; defects are bright rectangles."""
    rng = np.random.default_rng(0)
    lines = []
    for class_name in classes:
        for label in (0, 1):
            for number in range(per_kind):
                pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
                entry = {"image_path": f"{class_name}/{label}_{number}.png", "label": label, "class_name": class_name}
                (folder / class_name).mkdir(parents=True, exist_ok=True)
                if label:
                    mask = np.zeros((40, 48), dtype=np.uint8)
                    mask[5 + number : 22, 10 : 26 + number] = 255
                    pixels[mask > 0] = 230
                    entry["mask_path"] = f"{class_name}/{label}_{number}_mask.png"
                    Image.fromarray(mask).save(folder / entry["mask_path"])
                Image.fromarray(pixels).save(folder / entry["image_path"])
                lines.append(json.dumps(entry))
    (folder / "full-shot.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_mvtec_tree(root: Path, class_name: str = "metal_nut") -> Path:
    """Six normal and six anomalous noise images of 48 x 40 px in MVTec's tree, and one for training."""
    rng = np.random.default_rng(0)
    for number in range(13):
        kind = "train/good" if number == 12 else "test/good" if number < 6 else "test/bent"
        image = root / class_name / kind / f"{number:03}.png"
        pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
        image.parent.mkdir(parents=True, exist_ok=True)
        if kind == "test/bent":
            mask = np.zeros((40, 48), dtype=np.uint8)
            mask[5 + number : 22, 10 : 26 + number] = 255
            pixels[mask > 0] = 230
            place = root / class_name / "ground_truth" / "bent"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(place / f"{number:03}_mask.png")
        Image.fromarray(pixels).save(image)
    return root


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_small_dataset(root / "small")
    return root


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """The demo backbone."""
    return load_backbone("demo")


def make_model(backbone: Backbone, seed: int = 0, **config) -> CrossAttentionCLIP:
    """A model with fresh adapters from `seed`; both cross-attentions off unless asked for."""
    torch.manual_seed(seed)
    chosen = {"text_adapt_until": 3, "image_adapt_until": 3} | config
    return CrossAttentionCLIP(backbone, ModelConfig(backbone.model_name, backbone.img_size, **chosen))


def encode_stage1(
    model: CrossAttentionCLIP,
    images: torch.Tensor,
    classes: list[str],
    text: ClassText,
    features: str,
    vv_start: int,
    vv_across_batch: bool,
    precision: str = "fp32",
    other: torch.Tensor | None = None,
) -> Encoding:
    """What Stage 1's losses are made of, from images; the rest as in `see_stage1`."""
    sight = see_stage1(model, images, classes, text, features, vv_start, vv_across_batch, precision, other)
    return encode_sight(model, sight, classes, text, precision)


def move_cross_attention(model: CrossAttentionCLIP) -> None:
    """Give the cross-attentions an output, as training does."""
    generator = torch.Generator().manual_seed(1)
    for module in (model.text_cross_attn, model.image_cross_attn):
        if isinstance(module, Gated):
            module.open(1)
        elif module is not None:
            weight = torch.randn(module.out_proj.weight.shape, generator=generator)
            module.out_proj.weight.data.copy_(weight)


class Scripts:
    """Calls the scripts of the repository in this process; returns their exit code."""

    def __init__(self, monkeypatch, data_root: Path):
        self.monkeypatch, self.data_root = monkeypatch, data_root

    def __call__(self, script: str, *arguments: object, data_root: Path | None = None) -> int:
        module = importlib.import_module(script)
        command = [f"{script}.py", *map(str, arguments)]
        if script != "predict":  # which has no data set
            command += ["--data_root", str(data_root or self.data_root)]
        self.monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_info:
            run_script(module.main)
        return exit_info.value.code


@pytest.fixture
def scripts(monkeypatch, data_root) -> Scripts:
    return Scripts(monkeypatch, data_root)


@pytest.fixture
def no_estimates(monkeypatch) -> None:
    """Trainings say nothing of what to expect: it takes seconds, and test_estimate.py has it."""
    for script in ("train", "train_cross_attention"):
        monkeypatch.setattr(importlib.import_module(script), "describe_estimates", lambda *how: "")


@pytest.fixture(scope="session")
def base(tmp_path_factory, data_root) -> Path:
    """A base model that train.py trained on the small data set."""
    folder = tmp_path_factory.mktemp("ckpt") / "small_base"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert Scripts(monkeypatch, data_root)("train", *SMALL, *EPOCHS, "--save_path", folder) == 0
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, base, data_root) -> Path:
    """A finished run of two loops, called x."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    command = ["train_cross_attention", "--dataset", "small", "--device", "cpu", *EPOCHS, "--loops", "2"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert Scripts(monkeypatch, data_root)(*command, "--resume", base, "--save_path", folder) == 0
    return folder


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the four modules of a checkpoint."""
    modules = checkpoints.load_checkpoint(path).modules
    return {f"{name}.{key}": value for name, state in modules.items() for key, value in (state or {}).items()}


def assert_same_tensors(first: Path, second: Path) -> None:
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def listing(root: Path) -> dict[str, int]:
    """{path: when it was changed} of all that is in a folder, to tell whether anything was written."""
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in root.rglob("*")}
