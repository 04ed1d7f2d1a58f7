"""Drawing: images with the maps of several models, and what cross-attentions look at."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Polygon
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from dataset.files import replacing
from dataset.words import printable

PANEL_INCHES = 1.7
OUTLINE = "cyan"
MAP_COLOURS, DIFFERENCE_COLOURS, ATTENTION_COLOURS = "inferno", "RdBu_r", "viridis"
# Of differences of maps that go from 0 to 1.
SMALLEST_SCALE = 0.05
# Height by width, or width by height, of the place that an image has in a picture.
MOST_ELONGATED = 4
RIGHT, WRONG, UNKNOWN = "#1a7f37", "#c02020", "black"


# Names of images and classes are no formulas.
matplotlib.rcParams["text.parse_math"] = False


@dataclass(frozen=True)
class Panel:
    """One model's map of an image, `values` [H, W], what is said beneath, and whether that is right (None: unknown).

    `outlines`: polygons on it, x and y in turn, in px of the image that is shown.
    """

    values: np.ndarray
    caption: str
    right: bool | None = None
    outlines: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Example:
    """An image [H, W, 3] in 0..1 with its ground truth `mask` [H, W] (None: not known) and each model's panel."""

    title: str
    pixels: np.ndarray
    mask: np.ndarray | None
    panels: list[Panel]


def draw_examples(examples: list[Example], models: list[str], scaled_by: str, title: str, path: Path) -> None:
    """A row per image: it, with the outline of its defect, every model's map, and later models' less the first's.

    Maps are drawn from 0 to 1; `scaled_by` says what they were scaled by. All differences share a scale around 0.
    """
    later = models[1:]
    shapes = [_shape(example.pixels) for example in examples]
    columns = 1 + len(models) + len(later)
    height = sum((PANEL_INCHES + 0.35) * shape for shape in shapes) + 0.9
    figure = Figure(figsize=(PANEL_INCHES * columns + 1.2, height), layout="constrained")
    axes = figure.subplots(len(examples), columns, squeeze=False, height_ratios=shapes)
    moved = [panel.values - example.panels[0].values for example in examples for panel in example.panels[1:]]
    # A trifle would look dramatic without a smallest scale.
    most = max([SMALLEST_SCALE, *(float(np.abs(values).max()) for values in moved)])
    for row, example in zip(axes, examples, strict=True):
        _draw_example(row, example, most)
    masks = any(example.mask is not None and example.mask.any() for example in examples)
    less = "the first" if len(later) > 1 else models[0]
    heads = ["image and defect" if masks else "image", *models, *(f"{name} less {less}" for name in later)]
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(_wrapped(head), fontsize=6)
    _draw_scale(figure, axes[:, 1 : 1 + len(models)], f"anomaly map, scaled by {scaled_by}")
    if later:
        _draw_scale(figure, axes[:, 1 + len(models) :], "difference")
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def _shape(pixels: np.ndarray) -> float:
    """Height by width of what an image is drawn in; one that is far longer than wide stands small in it."""
    return min(max(pixels.shape[0] / pixels.shape[1], 1 / MOST_ELONGATED), MOST_ELONGATED)


def _draw_example(row: Sequence[Axes], example: Example, most: float) -> None:
    """One image, its maps, and what later maps have more than the first, up to `most`, in a row of axes."""
    extent, first = _extent(example.pixels), example.panels[0].values
    row[0].imshow(example.pixels)
    row[0].set_ylabel(example.title, fontsize=6)
    for axis, panel in zip(row[1:], example.panels, strict=False):
        axis.imshow(panel.values, cmap=MAP_COLOURS, vmin=0, vmax=1, extent=extent)
        colour = UNKNOWN if panel.right is None else RIGHT if panel.right else WRONG
        axis.set_xlabel(panel.caption, fontsize=6, labelpad=2, color=colour)
        for around in panel.outlines:
            axis.add_patch(Polygon(np.reshape(around, (-1, 2)) - 0.5, fill=False, color=OUTLINE, linewidth=0.8))
    for axis, panel in zip(row[1 + len(example.panels) :], example.panels[1:], strict=True):
        axis.imshow(panel.values - first, cmap=DIFFERENCE_COLOURS, vmin=-most, vmax=most, extent=extent)
    for axis in row:
        _bare(axis)
        _outline(axis, example)


def _bare(axis: Axes) -> None:
    """Without ticks."""
    axis.set_xticks([])
    axis.set_yticks([])


def _outline(axis: Axes, example: Example) -> None:
    """Around the defect, where there is one."""
    if example.mask is not None and example.mask.any():
        axis.contour(example.mask, [0.5], colors=OUTLINE, linewidths=0.8)


def _draw_scale(figure: Figure, axes: np.ndarray, label: str) -> None:
    """The colours of the maps in `axes`, beneath them."""
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes, location="bottom", shrink=0.8, aspect=30, pad=0.01)
    bar.set_label(_wrapped(label, 32 * axes.shape[1]), fontsize=6)
    bar.ax.tick_params(labelsize=6)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))


def _extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Where a map lies that covers an image [H, W, 3], for imshow."""
    return -0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5


def _wrapped(name: str, width: int = 24) -> str:
    """A name over several lines, broken after slashes and underscores."""
    lines = [""]
    for piece in name.replace("/", "/\0").replace("_", "_\0").replace(" ", " \0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file; its folder is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()).expandtabs(1))  # control characters have no shape
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks is drawn with boxes
        figure.savefig(file, dpi=110, format="png")


def _finish(
    figure: Figure, shown: AxesImage, axes: np.ndarray, shrink: float, label: str, title: str, path: Path
) -> None:
    """The scale of `shown` beside all `axes`, a title, and the file."""
    bar = figure.colorbar(shown, ax=axes, shrink=shrink)
    bar.set_label(label, fontsize=6)
    bar.ax.tick_params(labelsize=6)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def draw_levels(example: Example, maps: np.ndarray, label: str, signed: bool, title: str, path: Path) -> None:
    """An image beside the map of each level, `maps` [levels, h, w]; `signed` ones have a scale around 0."""
    figure = Figure(figsize=(PANEL_INCHES * (1 + len(maps)) + 1, PANEL_INCHES + 0.6), layout="constrained")
    first, *others = axes = figure.subplots(1, 1 + len(maps))
    first.imshow(example.pixels)
    first.set_title("image", fontsize=6)
    high = float(np.abs(maps).max()) if signed else float(maps.max())
    low = -high if signed else float(maps.min())
    colours = DIFFERENCE_COLOURS if signed else ATTENTION_COLOURS
    for number, (axis, values) in enumerate(zip(others, maps, strict=True), start=1):
        shown = axis.imshow(values, cmap=colours, vmin=low, vmax=high, extent=_extent(example.pixels))
        axis.set_title(f"V{number}", fontsize=6)
    for axis in axes:
        _bare(axis)
        _outline(axis, example)
    _finish(figure, shown, axes, 0.7, label, title, path)


def draw_prompts_on_image(
    example: Example, maps: np.ndarray, cls: np.ndarray, prompts: list[str], title: str, path: Path
) -> None:
    """Which patches each prompt looks at: `maps` [P, h, w] in units of even attention, `cls` [P] the share of CLS."""
    columns = 6
    lines = math.ceil((len(prompts) + 1) / columns)
    figure = Figure(figsize=(PANEL_INCHES * columns + 1, (PANEL_INCHES + 0.3) * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    first, *others = axes.ravel()
    first.imshow(example.pixels)
    first.set_title("image", fontsize=6)
    high = max(maps.max(), 2.0)
    for axis, values, prompt, share in zip(others, maps, prompts, cls, strict=False):
        shown = axis.imshow(values, cmap=ATTENTION_COLOURS, vmin=0, vmax=high, extent=_extent(example.pixels))
        axis.set_title(f"{_wrapped(prompt, 30)}\nCLS {share:.2f}", fontsize=5)
    for axis in axes.ravel():
        _bare(axis)
    for axis in axes.ravel()[: len(prompts) + 1]:
        _outline(axis, example)
    for axis in axes.ravel()[len(prompts) + 1 :]:
        axis.axis("off")
    _finish(figure, shown, axes, 0.5, "attention (1: as much as to any patch)", title, path)


def draw_tokens_of_patches(places: dict[str, np.ndarray], tokens: list[list[str]], title: str, path: Path) -> None:
    """Which prompt tokens image tokens look at: {place: [P, L] in units of even attention}, with the tokens written in.

    `tokens`: the P prompts' tokens; what a prompt has not, up to L, is padding and stays empty.
    """
    rows, columns = next(iter(places.values())).shape
    figure = Figure(figsize=(0.5 * columns * len(places) + 1.5, 0.27 * rows + 1), layout="constrained")
    axes = figure.subplots(1, len(places), squeeze=False)[0]
    high = max(2.0, max(values.max() for values in places.values()))
    for axis, (place, values) in zip(axes, places.items(), strict=True):
        words = np.array([[*line, *[""] * (columns - len(line))] for line in tokens])
        shown = axis.imshow(
            np.where(words == "", np.nan, values), cmap=ATTENTION_COLOURS, vmin=0, vmax=high, aspect="auto"
        )
        for (row, column), word in np.ndenumerate(words):
            colour = "black" if values[row, column] > 0.6 * high else "white"
            axis.text(column, row, word, ha="center", va="center", fontsize=4.5, color=colour)
        axis.set_title(place, fontsize=7)
        _bare(axis)
    _finish(figure, shown, axes, 0.7, "attention (1: as much as to any token)", title, path)
