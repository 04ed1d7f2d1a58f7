"""What torch.hub loads (https://docs.pytorch.org/docs/stable/hub.html), from any folder:

    detector = torch.hub.load("OWNER/REPO", "detector", ckpt="ckpt/RUN/loop_3.pth", class_name="metal bolt")
    verdict = detector("bolt.png")

With a clone, the path of its folder and source="local" stand for "OWNER/REPO". The caller's own modules may be called
model, dataset or utils, as packages here are.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

dependencies = ["torch", "torchvision", "open_clip", "numpy", "cv2", "PIL", "safetensors", "pydantic", "psutil", "tqdm"]

_HERE = Path(__file__).resolve().parent
# What `import` finds here.
_OWN = {path.stem for path in _HERE.glob("*.py")} | {path.parent.name for path in _HERE.glob("*/__init__.py")}
_known: dict[str, ModuleType] = {}
_lock = RLock()


@contextmanager
def _own_modules() -> Iterator[None]:
    """Within it `import` finds the modules of this repository; afterwards what the caller has of the same names.

    Who works inside this repository keeps its modules. Another thread must not import its own meanwhile.
    """
    with _lock:
        theirs = {name: module for name, module in _named().items() if not _is_here(module)}
        inside = not theirs and bool(_named())
        for name in theirs:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in _known.items() if name not in sys.modules})
        sys.path.insert(0, str(_HERE))
        try:
            yield
        finally:
            sys.path.remove(str(_HERE))
            _known.update(_named())
            if not inside:
                for name in _named():
                    del sys.modules[name]
                sys.modules.update(theirs)


def _named() -> dict[str, ModuleType]:
    """What is imported under names that this repository has too."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _OWN}


def _is_here(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(_HERE)


def detector(ckpt: str | Path, class_name: str = "object", **options: Any) -> Any:
    """A `Detector` of a loop file or the folder of a base, for images that show `class_name`.

    Called with an image (a file, a Pillow image, or pixels, uint8 [height, width, 3]) or a list of them it gives
    verdicts: map, scores, probability, decision, regions. `options` are those of `Detector.load`, called as the flags
    of predict.py: domain, device, precision, clip_weights, model_name, img_size, bits, reduced_jpeg, map_threshold.
    Raises FileNotFoundError or ValueError that say what was expected.
    """
    with _own_modules():
        from utils.judging import Detector

        return Detector.load(ckpt, class_name, **options)


def model(
    ckpt: str | Path,
    device: str | None = None,
    clip_weights: str | Path | None = None,
    model_name: str | None = None,
    img_size: int | None = None,
) -> Any:
    """The trained model of a loop file or the folder of a base, a `torch.nn.Module` of which nothing trains.

    `model.visual(images)` takes normalised pixels [B, 3, S, S]; docs/python.md has the rest. `model_name` and
    `img_size` are for bases that do not name them. Raises as `detector`.
    """
    named = {"model_name": model_name, "img_size": img_size}
    flags = {name: value for name, value in named.items() if value is not None}
    with _own_modules():
        from utils.checkpoints import load_checkpoint
        from utils.machine import device_of
        from utils.models import ModelLoader

        return ModelLoader(device_of(device), Path(clip_weights) if clip_weights else None, flags)(
            load_checkpoint(ckpt)
        )
