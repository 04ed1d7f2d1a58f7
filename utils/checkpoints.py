"""Checkpoint files: AA-CLIP's base, our loop files and the state of a run. Plain types and tensors only.

A loop file holds the four modules (state dicts, None where switched off), `loop`, `config` ({"model", "training"}),
`base`, `metrics`, `calibration` (of `utils.calibration`, None where it could not be fitted) and `environment`.
"""

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor, nn

from model.adapter_cross_attention import MODULES, CrossAttentionCLIP, ModelConfig
from model.backbone import REPOSITORY, Backbone, check_state
from utils.calibration import Calibration
from utils.plan import ADDED_SETTINGS, Run

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

    def seen(self) -> list[str]:
        """Data sets that the model was trained on, base and loops; "unknown" among them where the base is silent."""
        return sorted({*self.base["datasets"], *([self.training["dataset"]] if self.loop else [])})


def save(content: dict, path: Path) -> None:
    """Write `content` so that a crash leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: Path) -> dict:
    """The dict in a checkpoint file, on the CPU. Raises FileNotFoundError, or ValueError for any other content."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint. (train.py trains a base; ckpt/demo/base is one.)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise anything
        reason = shorten(str(error), 100) or type(error).__name__
        raise ValueError(f"{path}: no checkpoint, or a truncated one ({reason}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of modules, found {type(content).__name__}.")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A base (the folder of AA-CLIP's two files) or a loop file.

    Raises FileNotFoundError or ValueError that say what was expected.
    """
    path = Path(path)
    if path.is_dir():
        return _load_base(path)
    if path.name == TEXT_FILE or re.fullmatch(r"image_adapter(_\d+)?\.pth", path.name):
        raise ValueError(f"{path}: one half of a base model. Give its folder, {path.parent}.")
    content = read(path)
    missing = [key for key in MODULES if key not in content]
    if missing:
        raise ValueError(f"{path}: expected a loop file with {', '.join(MODULES)}; '{missing[0]}' is missing.")
    if "config" not in content:
        raise ValueError(
            f"{path}: 'config' is missing, so this file was not written by this program. Files of other attempts "
            "at cross-attention hold other arithmetic and cannot be used; train from their base model instead."
        )
    _expect(content, path, config=dict, loop=int, base=dict, environment=dict)
    config = content["config"]
    _expect(config, path, model=dict, training=dict)
    _expect(content["base"], path, sha256=dict, datasets=list)
    modules = {name: content[name] for name in MODULES}
    for name, state in modules.items():
        if state is not None or name.endswith("adapter"):
            _expect_tensors(state, name, path)
    clip_sha256 = content["environment"].get("clip_sha256")
    fitted = _calibration(content, path)
    model, training = config["model"], config["training"]
    return Checkpoint(path, content["loop"], modules, content["base"], model, training, clip_sha256, fitted, True)


def _calibration(content: dict, path: Path) -> Calibration | None:
    """The calibration in a file; None where it has none, as files of AA-CLIP and of older runs."""
    found = content.get("calibration")
    if found is None:
        return None
    _expect(content, path, calibration=dict)
    names = [each.name for each in fields(Calibration)]
    if sorted(found) != sorted(names):
        raise ValueError(f"{path}: 'calibration' holds {', '.join(found)}; expected {', '.join(names)}.")
    return Calibration(**found)


def _expect(content: dict, path: Path, **kinds: type) -> None:
    """Raise ValueError for the first key that is missing or of another kind."""
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            found = f"holds {type(content[key]).__name__}" if key in content else "is missing"
            raise ValueError(f"{path}: '{key}' {found}; expected {kind.__name__}.")


def _expect_tensors(state: object, name: str, path: Path) -> None:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: '{name}' holds no state dict; expected a dict of tensors.")


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
        _expect(content, path, epoch=int)
        _expect_tensors(content.get(name), name, path)
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
    fitted = _calibration(image, image_path)
    return Checkpoint(folder, 0, modules, base, config.get("model"), training, clip_sha256, fitted)


def loop_files(folder: Path) -> list[Path]:
    """loop_0.pth, loop_1.pth, ... of a run folder, in order."""
    return _numbered(folder, "loop")


def _numbered(folder: Path, name: str) -> list[Path]:
    """<name>_<number>.pth of a folder, by their numbers."""
    found = {path: re.fullmatch(rf"{name}_(\d+)", path.stem) for path in folder.glob(f"{name}_*.pth")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


def adapter_kind(checkpoint: Checkpoint) -> dict:
    """What the keys and shapes of a checkpoint say of its adapters: `relu`, `adapter_hidden` and the adapted blocks.

    Raises ValueError for adapters of another kind.
    """
    text, image = checkpoint.modules["text_adapter"], checkpoint.modules["image_adapter"]
    patterns = {
        "text_adapter": r"\d+\.fc\.[02]\.weight",
        "image_adapter": r"layer_adapters\.\d+\.fc\.[02]\.weight|(seg_proj\.\d+|det_proj)\.fc\.(0\.)?weight",
    }
    for name, pattern in patterns.items():
        for key in checkpoint.modules[name]:
            if not re.fullmatch(pattern, key):
                raise ValueError(
                    f"{checkpoint.path}: '{name}' holds '{key}', an adapter of an unknown kind. Known are AA-CLIP's "
                    "(fc.0: Linear, LeakyReLU) and the bottleneck (fc.0 and fc.2), both without bias."
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


def load_modules(model: CrossAttentionCLIP, checkpoint: Checkpoint) -> None:
    """Load what the checkpoint has into `model`; a module that it lacks stays as it is.

    Raises ValueError that names a key which is missing, unknown or of another shape.
    """
    for name, state in checkpoint.modules.items():
        module: nn.Module | None = getattr(model, name)
        if state is None:
            continue
        if module is None:
            raise ValueError(f"{checkpoint.path}: holds '{name}', which is switched off.")
        check_state(module.state_dict(), state, f"{checkpoint.path}: '{name}'")
        module.load_state_dict(state)


def build_model(
    config: ModelConfig, backbone: Backbone, checkpoint: Checkpoint | None, device: torch.device, seed: int = 0
) -> CrossAttentionCLIP:
    """The model of `config` on `device`; what the checkpoint does not hold starts from `seed`."""
    torch.manual_seed(seed)
    model = CrossAttentionCLIP(backbone, config)
    if checkpoint is not None:
        check_clip(checkpoint.clip_sha256, backbone, f"{checkpoint.path}: trained on other CLIP weights, SHA-256")
        load_modules(model, checkpoint)
    return model.to(device)


def check_clip(recorded: str | None, backbone: Backbone, what: str) -> None:
    """Raise ValueError, beginning with `what`, where CLIP weights are not the recorded ones (None: not known)."""
    if recorded is not None and recorded != backbone.sha256:
        raise ValueError(
            f"{what} {recorded[:16]}..., found {backbone.sha256[:16]}... for {backbone.model_name}. "
            "Give the right file with --clip_weights FILE."
        )


def check_data(state: dict, found: dict, folder: Path) -> None:
    """Raise ValueError where the images of a run that goes on are not those it began with."""
    recorded = state.get("data", found)  # older runs do not tell
    if recorded != found:
        raise ValueError(
            f"{folder}: this run began with {recorded['images']} images to train on and {recorded['held_out']} held "
            f"out; now there are {found['images']} and {found['held_out']}, or others of the same number (where images "
            "were added, --shot draws others). Bring back the folder as it was to go on, or choose another --save_path."
        )


def _origin(header: dict) -> tuple:
    """Hashes of the files that a run starts from."""
    base = header.get("base", {})
    return base.get("sha256"), base.get("continued_from", {}).get("sha256")


def open_run(run: Run) -> dict | None:
    """The state of a run that has begun, or None for a new one. Writes nothing.

    Raises ValueError where the folder holds anything else, or a run of another base, other arguments or more loops.
    """
    folder, header = run.folder, run.header
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    loops = loop_files(folder)
    rescue = f", or go on from {loops[-1]} with --resume and a new --save_path" if loops else ""
    if not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"{folder} exists and has no {STATE_FILE}, so no run goes on there. Choose another --save_path{rescue}."
        )
    try:
        state = read(folder / STATE_FILE)
        _expect(state, folder / STATE_FILE, config=dict, base=dict, position=tuple)
    except ValueError as error:
        raise ValueError(f"{error} Choose another --save_path{rescue}.") from error
    if _origin(state) != _origin(header):
        raise ValueError(
            f"{folder} holds a run that started from another base, {state['base']}. Choose another --save_path."
        )
    differences = [
        f"  {name}: {old.get(name)} before, {new.get(name)} now"
        for part, added in (("model", {}), ("training", ADDED_SETTINGS))
        for old, new in [(added | state["config"][part], header["config"][part])]
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds a run with other arguments:\n"
            + "\n".join(differences)
            + "\nRepeat the earlier ones to go on, or choose another --save_path."
        )
    finished = state["position"][0] - 1
    if run.last_loop < finished:
        raise ValueError(f"--loops {run.last_loop}: the run in {folder} already has {finished} loops.")
    return state


def states(model: CrossAttentionCLIP) -> dict[str, dict[str, Tensor] | None]:
    """State dicts of the four modules, on the CPU and apart from the model's own tensors; None where switched off."""
    trainable = model.trainable()
    return {
        name: {key: value.detach().cpu().clone() for key, value in trainable[name].state_dict().items()}
        if name in trainable
        else None
        for name in MODULES
    }


def environment(backbone: Backbone, device: torch.device) -> dict:
    """Versions, device, git revision and CLIP weights, for whoever wonders how a checkpoint came to be."""
    try:
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None  # not a clone, or no git here
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "git_revision": revision,
        "clip_sha256": backbone.sha256,
    }
