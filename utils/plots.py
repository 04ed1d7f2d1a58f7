"""Pictures for people: contact sheets of images, ground truth and anomaly maps."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from forward_utils_cross_attention import Prediction

PANEL_INCHES = 1.6
OUTLINE = "cyan"
MAP_COLOURS = "inferno"


@dataclass
class Example:
    """One image: `pixels` [S, S, 3] in 0..1, `mask` [S, S], and of each model its map [S, S] and detection score."""

    title: str
    pixels: np.ndarray
    mask: np.ndarray
    maps: list[np.ndarray]
    scores: list[float]


@dataclass
class ContactSheets:
    """Keeps the first `count` anomalous and the first `count` normal images of each class, for all of `models`."""

    models: list[str]
    count: int
    kept: dict[str, dict[int, list[Example]]] = field(default_factory=lambda: defaultdict(lambda: {1: [], 0: []}))

    def add(self, batch: dict, predictions: list[Prediction]) -> None:
        """Take what is wanted of a batch and of every model's predictions on it."""
        for row, (class_name, label) in enumerate(zip(batch["class_name"], batch["label"].tolist(), strict=True)):
            examples = self.kept[class_name][label]
            if len(examples) < self.count:
                examples.append(
                    Example(
                        title="/".join(Path(batch["path"][row]).with_suffix("").parts[-2:]),
                        pixels=to_picture(batch["image"][row]),
                        mask=batch["mask"][row, 0].numpy(),
                        maps=[each.maps[row].cpu().numpy() for each in predictions],
                        scores=[each.scores[row].item() for each in predictions],
                    )
                )

    def write(self, class_name: str, path: Path) -> None:
        """A row per image: it with the outline of its defect, and every model's map, on one scale for the sheet."""
        labels = self.kept.pop(class_name)
        examples = [example for group in labels.values() for example in group]
        low = min(panel.min() for example in examples for panel in example.maps)
        high = max(panel.max() for example in examples for panel in example.maps)
        columns = 1 + len(self.models)
        figure = Figure(
            figsize=(PANEL_INCHES * columns + 0.8, PANEL_INCHES * len(examples) + 0.5), layout="constrained"
        )
        axes = figure.subplots(len(examples), columns, squeeze=False)
        for row, example in zip(axes, examples, strict=True):
            row[0].imshow(example.pixels)
            row[0].set_ylabel(example.title, fontsize=6)
            for axis, panel, score in zip(row[1:], example.maps, example.scores, strict=True):
                shown = axis.imshow(panel, cmap=MAP_COLOURS, vmin=low, vmax=high)
                axis.set_xlabel(f"detection score {score:.3f}", fontsize=6, labelpad=2)
            for axis in row:
                axis.set_xticks([])
                axis.set_yticks([])
                if example.mask.any():
                    axis.contour(example.mask, [0.5], colors=OUTLINE, linewidths=0.8)
        for axis, title in zip(axes[0], ["image and defect", *self.models], strict=True):
            axis.set_title(title, fontsize=7)
        figure.colorbar(shown, ax=axes[:, 1:], shrink=0.6, label="anomaly map")
        figure.suptitle(class_name, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def to_picture(pixels: Tensor) -> np.ndarray:
    """CLIP's normalised pixels [3, S, S] -> [S, S, 3] in 0..1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
