"""Checkpoint files: AA-CLIP's base, our loop files and the state of a run. Plain types and tensors only.

A loop file holds the four modules (state dicts, None where switched off), `loop`, `config` ({"model", "training"}),
`base`, `metrics`, `calibration` (of `utils.calibration`, None where it could not be fitted) and `environment`.
"""

import io
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from dataset.files import replacing
from model.adapter_cross_attention import MODULES, CrossAttentionCLIP
from model.backbone import Backbone
from model.config import REPOSITORY
from model.pickles import read_archive
from model.weights import check_weights, weights_sha256
from utils import processes
from utils.calibration import Calibration
from utils.files import file_sha256, is_exported
from utils.schema import HalfOfBase, LoopFile, expect

TEXT_FILE, IMAGE_FILE, STATE_FILE = "text_adapter.pth", "image_adapter.pth", "state.pth"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. `model` (ModelConfig), `training` (Settings), `clip_sha256` and `calibration` may be unknown."""

    path: Path
    loop: int
    modules: dict[str, dict[str, Tensor] | None]
    base: dict
    model: dict | None = None
    training: dict | None = None
    clip_sha256: str | None = None
    calibration: Calibration | None = None
    is_loop_file: bool = False

    @property
    def is_base(self) -> bool:
        """Whether this is a base, in its own folder or as a loop_0.pth."""
        return self.loop == 0

    @property
    def folder(self) -> Path:
        """Where files about this model go: the folder of its run, or of the base."""
        return self.path.parent if self.is_loop_file else self.path

    @property
    def stem(self) -> Path:
        """Where the names of its own files begin: <run>/loop_<k>, or <folder of the base>/base."""
        return self.path.with_suffix("") if self.is_loop_file else self.path / "base"

    @property
    def own_training(self) -> dict | None:
        """Settings that this model itself was trained with, a base's before any loop; None where they are not known."""
        return self.base.get("training") if self.is_base else self.training

    @property
    def seed(self) -> int | None:
        """Seed of its own training; None where it is not known."""
        return (self.own_training or {}).get("seed")

    def seen(self) -> list[str]:
        """Data sets that the model was trained on, base and loops; "unknown" among them where the base is silent."""
        own = [] if self.is_base or self.training is None else [self.training["dataset"]]
        return sorted({*self.base["datasets"], *own})


def save(content: dict, path: Path) -> None:
    """Write `content` so that a crash leaves the old file or the new one, never half of one."""
    # In memory first: PyTorch's own errors of writing do not say that a disk is full.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read(path: Path) -> dict:
    """The dict in a checkpoint file, on the CPU. Raises FileNotFoundError, or ValueError for any other content."""
    check_there(path)
    try:
        content = read_archive(path)
    except Exception as error:  # unpickling damaged bytes may raise anything
        reason = shorten(str(error)[:1000], 200) or type(error).__name__
        raise ValueError(f"{path}: not readable as a checkpoint ({reason}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of modules, found {type(content).__name__}.")
    return content


def check_there(path: Path) -> None:
    """Raise FileNotFoundError, with what there is, where there is neither a file nor a folder of a checkpoint."""
    if path.exists():
        return
    parent = path.parent
    folders = sorted(entry for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    there = [entry.name for entry in loop_files(parent) or folders]
    own = REPOSITORY / "ckpt" / "demo" / "base"
    hint = f"In {parent}: {shorten(', '.join(there), 200)}." if there else f"train.py trains a base; {own} is one."
    raise FileNotFoundError(f"{path}: no such checkpoint, as seen from {Path.cwd()}. {hint}")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A base (the folder of AA-CLIP's two files) or a loop file.

    Raises FileNotFoundError or ValueError that say what was expected.
    """
    path = Path(path)
    if path.is_dir():
        return _load_base(path)
    if path.name == TEXT_FILE or re.fullmatch(r"image_adapter(_\d+)?\.pth", path.name):
        raise ValueError(f"{path}: one half of a base model. Give its folder, {path.parent}.")
    if path.name == STATE_FILE:
        raise ValueError(f"{path}: the state of a run, from which it goes on. Give a loop file, or the folder.")
    if is_exported(path):
        raise ValueError(f"{path}: an exported model, which predict.py runs. Expected the checkpoint it was made of.")
    content = read(path)
    missing = [key for key in MODULES if key not in content]
    if missing:
        raise ValueError(f"{path}: expected a loop file with {', '.join(MODULES)}; '{missing[0]}' is missing.")
    if "config" not in content:
        raise ValueError(
            f"{path}: 'config' is missing, so this file was not written by this program. Files of other attempts "
            "at cross-attention hold other arithmetic and cannot be used; train from their base model instead."
        )
    expect(LoopFile, content, path)
    config, modules = content["config"], {name: content[name] for name in MODULES}
    for name, state in modules.items():
        check_weights(state or {}, f"{path}: '{name}'")
    clip_sha256 = content["environment"].get("clip_sha256")
    fitted = _calibration(content)
    model, training = config["model"], config["training"]
    return Checkpoint(path, content["loop"], modules, content["base"], model, training, clip_sha256, fitted, True)


def _calibration(content: dict) -> Calibration | None:
    """The calibration in a file; None where it has none, as files of AA-CLIP and of older runs."""
    found = content.get("calibration")
    return None if found is None else Calibration(**found)


def _load_base(folder: Path) -> Checkpoint:
    text_path, image_path = folder / TEXT_FILE, folder / IMAGE_FILE
    if not image_path.is_file():
        image_path = next(reversed(_numbered(folder, "image_adapter")), image_path)
    for path in (text_path, image_path):
        if not path.is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{folder}: no {path.name}. A base model is a folder with {TEXT_FILE} (Stage 1) and {IMAGE_FILE} or "
                f"image_adapter_<epoch>.pth (Stage 2); found {found}. To go on from a loop file, name the file."
            )
    text, image = read(text_path), read(image_path)
    for content, name, path in ((text, "text_adapter", text_path), (image, "image_adapter", image_path)):
        expect(HalfOfBase, content, path)
        if not isinstance(content.get(name), dict):
            raise ValueError(f"{path}: '{name}' is missing, the state dict of AA-CLIP's adapters.")
        content[name] = _without_prefix(content[name])
        check_weights(content[name], f"{path}: '{name}'")
        if content["epoch"] < 1:
            raise ValueError(
                f"{path}: epoch is {content['epoch']}: this base was never trained. Train it with train.py."
            )
    if text.get("config") != image.get("config"):
        raise ValueError(f"{folder}: {text_path.name} and {image_path.name} are of two different runs.")
    config = text.get("config") or {}
    training = config.get("training")
    modules = dict.fromkeys(MODULES) | {"text_adapter": text["text_adapter"], "image_adapter": image["image_adapter"]}
    base = {
        "path": folder.as_posix(),
        "sha256": {path.name: file_sha256(path) for path in (text_path, image_path)},
        "epochs": {"text": text["epoch"], "image": image["epoch"]},
        "datasets": ["unknown" if training is None else training["dataset"]],
        "training": training,
    }
    clip_sha256 = text.get("environment", {}).get("clip_sha256")
    fitted = _calibration(image)
    return Checkpoint(folder, 0, modules, base, config.get("model"), training, clip_sha256, fitted)


def _without_prefix(state: dict) -> dict:
    """A state dict without what DataParallel puts before every name."""
    wrapped = state and all(str(name).startswith("module.") for name in state)
    return {name.removeprefix("module."): value for name, value in state.items()} if wrapped else state


def checkpoints_of(path: Path) -> list[Checkpoint]:
    """The checkpoints that an argument of --ckpt names: one, or all loops of a run folder."""
    if path.is_dir() and not (path / TEXT_FILE).is_file() and loop_files(path):
        return [load_checkpoint(file) for file in loop_files(path)]
    return [load_checkpoint(path)]


def all_checkpoints(paths: Iterable[Path]) -> list[Checkpoint]:
    """The checkpoints that several arguments name, each once."""
    named = [checkpoint for path in paths for checkpoint in checkpoints_of(path)]
    return list({checkpoint.path.resolve(): checkpoint for checkpoint in named}.values())


def one_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that an argument names. Raises ValueError where it is a run of several."""
    checkpoint, *others = checkpoints_of(path)
    if others:
        raise ValueError(f"{path}: a run of {1 + len(others)} loops. Name one of its files.")
    return checkpoint


def checkpoint_names(checkpoints: list[Checkpoint]) -> list[str]:
    """A name for each checkpoint: the end of its path, as long as it takes to tell it from the others."""

    def end(checkpoint: Checkpoint, more: int) -> str:
        path = checkpoint.path.resolve()
        parts = (path.with_suffix("") if checkpoint.is_loop_file else path).parts
        return "/".join(parts[-(more + (2 if checkpoint.is_loop_file else 1)) :])

    more = [0] * len(checkpoints)
    while True:
        names = [end(checkpoint, extra) for checkpoint, extra in zip(checkpoints, more, strict=True)]
        twice = [row for row, name in enumerate(names) if names.count(name) > 1]
        if not twice:
            break
        for row in twice:
            more[row] += 1
    return [
        f"{name} (base)" if checkpoint.loop == 0 and "base" not in name else name
        for checkpoint, name in zip(checkpoints, names, strict=True)
    ]


def loop_files(folder: Path) -> list[Path]:
    """loop_0.pth, loop_1.pth, ... of a run folder, in order."""
    return _numbered(folder, "loop")


def _numbered(folder: Path, name: str) -> list[Path]:
    """<name>_<number>.pth of a folder, by their numbers."""
    found = [(path, re.fullmatch(rf"{name}_(\d+)", path.stem)) for path in folder.glob(f"{name}_*.pth")]
    return [path for _, path in sorted((int(match[1]), path) for path, match in found if match)]


def adapter_kind(checkpoint: Checkpoint) -> dict:
    """What the keys and shapes of a checkpoint say of its adapters: `relu`, `adapter_hidden` and the adapted blocks.

    Raises ValueError for adapters of another kind.
    """
    text, image = checkpoint.modules["text_adapter"] or {}, checkpoint.modules["image_adapter"] or {}
    patterns = {
        "text_adapter": r"\d+\.fc\.[02]\.weight",
        "image_adapter": r"layer_adapters\.\d+\.fc\.[02]\.weight|(seg_proj\.\d+|det_proj)\.fc\.(0\.)?weight",
    }
    for name, pattern in patterns.items():
        for key, value in (checkpoint.modules[name] or {}).items():
            if not re.fullmatch(pattern, key):
                raise ValueError(
                    f"{checkpoint.path}: '{name}' holds {key[:80]!r}, an adapter of an unknown kind. Known are "
                    "AA-CLIP's (fc.0: Linear, LeakyReLU) and the bottleneck (fc.0 and fc.2), both without bias."
                )
            if value.ndim != 2:
                raise ValueError(
                    f"{checkpoint.path}: {key[:80]!r} has the shape {list(value.shape)}; expected a matrix."
                )
    numbers = {int(key.split(".")[0]) for key in text}
    layers = {int(key.split(".")[1]) for key in image if key.startswith("layer_adapters.")}
    if "0.fc.0.weight" not in text or not layers:
        raise ValueError(f"{checkpoint.path}: lacks the first adapter of a tower.")
    bottleneck = "0.fc.2.weight" in text
    return {
        "relu": "det_proj.fc.0.weight" in image,
        "adapter_hidden": text["0.fc.0.weight"].shape[0] if bottleneck else None,
        "text_adapt_until": len(numbers) - 1,
        "image_adapt_until": len(layers),
    }


def states(model: CrossAttentionCLIP) -> dict[str, dict[str, Tensor] | None]:
    """State dicts of the four modules, on the CPU and apart from the model's own tensors; None where switched off."""
    trainable = model.trainable()
    return {
        name: {key: value.detach().cpu().clone() for key, value in trainable[name].state_dict().items()}
        if name in trainable
        else None
        for name in MODULES
    }


def model_sha256(model: CrossAttentionCLIP) -> str:
    """SHA-256 of the weights of all that trains."""
    parts = {name: state for name, state in states(model).items() if state is not None}
    return weights_sha256({f"{name}.{key}": tensor for name, state in parts.items() for key, tensor in state.items()})


def environment(backbone: Backbone, device: torch.device) -> dict:
    """Versions, device, git revision and CLIP weights, for whoever wonders how a checkpoint came to be."""
    try:
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None  # not a clone, or no git here
    return {
        **processes.versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "git_revision": revision,
        "clip_sha256": backbone.sha256,
    }
