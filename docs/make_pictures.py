r"""Draw the pictures of the documentation, from a finished run of the demo.

    make demo
    python -m docs.make_pictures

writes strip.png, prompts.png and method.png to docs/pictures. page.png is the page of app.py with an example, and
needs requirements/page.txt, playwright and chromium:

    python -m docs.make_pictures --page

report.png is the top of a report on all loops, as a browser shows it, brought to few colours:

    python test.py --ckpt ckpt/demo_feedback --dataset demo_test --report
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1330,1300 \
        --screenshot=docs/pictures/report.png \
        "file://$PWD/ckpt/demo_feedback/report_demo_test.html"
    python -m docs.make_pictures --shrink docs/pictures/report.png
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from dataset.commands import add_data_root, path_argument
from dataset.images import read_record
from dataset.sets import DataSet, open_dataset
from dataset.transforms import Transform
from forward_utils_cross_attention import PromptBank
from utils.checkpoints import load_checkpoint, loop_files
from utils.judging import Detector
from utils.models import ModelLoader
from utils.report.pictures import attention_weights
from utils.verdicts import calibrated_extremes, scaled

PICTURES = Path(__file__).parent / "pictures"
# Pixels of a picture for each of a README page, which is 830 wide.
DENSITY = 2
WIDTH = 830
# Okabe and Ito's colours, which the colour-blind tell apart: (line, filling).
TEXT, IMAGE, ADDED = ("#B36B00", "#FDEFD5"), ("#0072B2", "#DCEDF8"), ("#A0457B", "#F6DFEC")
INK = "#222222"
FROZEN, PLAIN = ("#777777", "#EEEEEE"), (INK, "white")
MAP_COLOURS, ATTENTION_COLOURS = "inferno", "viridis"
OUTLINE = "cyan"
# What the strip shows, (class, which image of it), and the image that the cross-attentions look at.
SHOWN = (("bottle_top", 21), ("key", 23), ("battery", 49), ("cork", 0))
LOOKED_AT = ("bottle_top", 31)
# Which example the page is shown with.
PAGE_EXAMPLE = 3
# A pixel of a README page in points of a figure of 100 of them to the inch.
POINTS = 72 / 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=path_argument, default=Path("ckpt/demo_feedback"), help="folder of the demo's run"
    )
    add_data_root(parser)
    parser.add_argument("--page", action="store_true", help="draw page.png, and stop")
    parser.add_argument("--shrink", type=path_argument, help="bring this picture to 256 colours, and stop")
    return parser.parse_args()


def load_detectors(run: Path, data: DataSet) -> list[Detector]:
    """The base of a run and its last loop, for images of `data`."""
    loader = ModelLoader(torch.device("cpu"))
    checkpoints = [load_checkpoint(path) for path in (run / "loop_0.pth", loop_files(run)[-1])]
    models = [loader(checkpoint) for checkpoint in checkpoints]
    bank = PromptBank(loader.backbone, data.descriptions, data.domain)
    return [
        Detector.of(model, bank, checkpoint.calibration) for model, checkpoint in zip(models, checkpoints, strict=True)
    ]


# strip.png


def draw_strip(detectors: list[Detector], data: DataSet) -> Figure:
    """Two products a row: image, defect, the base's anomaly map and the extended model's."""
    heads = ("image", "defect", "map: base", "map: extended")
    side, gap, between, top = 96, 4, 22, 22
    block = len(heads) * (side + gap) - gap
    figure = blank(2 * block + between, top + (len(SHOWN) + 1) // 2 * (side + gap) - gap)
    for place, (class_name, index) in enumerate(SHOWN):
        image, mask, pixels = read(data, class_name, index, detectors[0])
        pictures: list[dict[str, Any]] = [{"X": image}, {"X": mask, "cmap": "gray", "vmin": 0, "vmax": 1}]
        for detector in detectors:
            found = detector.predict(pixels, [class_name], [f"{class_name} {index}"])
            ends, _ = calibrated_extremes([detector], (found.maps.min().item(), found.maps.max().item()), "this map")
            shown = scaled(found.maps[0].numpy(), ends[0])
            pictures.append({"X": shown, "cmap": MAP_COLOURS, "vmin": 0, "vmax": 1})
        for column, (head, picture) in enumerate(zip(heads, pictures, strict=True)):
            x = place % 2 * (block + between) + column * (side + gap)
            axes = panel(figure, x, top + place // 2 * (side + gap), side)
            axes.imshow(**picture)
            if place < 2:
                title(axes, head)
            if head == "defect" and not mask.any():
                axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="white")
    return figure


# prompts.png


def draw_prompts(detectors: list[Detector], data: DataSet) -> Figure:
    """Where the cross-attentions of the last loop look in one image, as means over levels."""
    class_name, index = LOOKED_AT
    image, mask, pixels = read(data, class_name, index, detectors[-1])
    grid = detectors[-1].model.backbone.grid
    weights = attention_weights(detectors[-1], pixels, class_name)
    like, taken = (
        weights[name].mean(dim=0).unflatten(0, (grid, grid)).numpy() for name in ("text_cross_attn", "image_cross_attn")
    )
    side, gap, top, bar = 232, 56, 26, 52
    figure = blank(3 * (side + gap) - gap + 2, top + side + bar)
    most = float(np.abs(taken).max())
    shown: tuple[tuple[str, dict[str, Any], str | None], ...] = (
        ("image and defect", {"X": image}, None),
        ("text -> image", {"X": like, "cmap": ATTENTION_COLOURS}, "cosine with the patches most like it"),
        (
            "image -> text",
            {"X": taken, "cmap": "PuOr_r", "vmin": -most, "vmax": most},
            "what det takes (negative: gives)",
        ),
    )
    for column, (head, picture, what) in enumerate(shown):
        x = 1 + column * (side + gap)
        axes = panel(figure, x, top, side)
        # Patches are larger than pixels: all lie on the same square.
        drawn = axes.imshow(**picture, extent=(0, 1, 1, 0))
        axes.contour(np.linspace(0, 1, mask.shape[1]), np.linspace(0, 1, mask.shape[0]), mask, [0.5], colors=[OUTLINE])
        title(axes, head)
        if what:
            scale(figure, drawn, x, top + side + 10, side, what)
    return figure


# method.png


class Drawing:
    """Boxes, words and arrows on a page whose units are pixels of a README page; y grows downwards."""

    def __init__(self, width: float, height: float):
        self.figure = blank(width, height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(-2, width + 2), ylim=(height + 2, -2))
        self.axes.axis("off")

    def box(
        self, x: float, y: float, width: float, height: float, words: str, colours: tuple[str, str], **style
    ) -> None:
        """A box with its words in the middle; x and y are its upper left corner."""
        shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=5", linewidth=1.4)
        shape.set(edgecolor=colours[0], facecolor=colours[1])
        self.axes.add_patch(shape)
        self.words(x + width / 2, y + height / 2, words, **style)

    def words(self, x: float, y: float, words: str, size: float = 12, colour: str = INK, **style: Any) -> None:
        placed: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.25, **style}
        self.axes.text(x, y, words, fontsize=size * POINTS, color=colour, **placed)

    def arrow(self, *points: tuple[float, float], colour: str = INK, width: float = 1.4) -> None:
        """A line through `points` that ends in an arrow."""
        if len(points) > 2:
            self.axes.plot(*zip(*points[:-1], strict=True), color=colour, linewidth=width)
        end = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", points[-1], points[-2], arrowprops=end | {"color": colour, "linewidth": width})


def draw_method() -> Figure:
    """One image through the model, and the loops of training."""
    page = Drawing(WIDTH, 548)
    page.words(0, 12, "One image through the model", 14, ha="left", weight="bold")
    draw_forward(page, text_row=62, image_row=216)
    page.words(0, 288, "Training: Stage 1, then Stage 2, in loops", 14, ha="left", weight="bold")
    draw_loops(page, top=308)
    legend = (
        (68, FROZEN, "frozen CLIP"),
        (210, TEXT, "text side: Stage 1 trains it"),
        (436, IMAGE, "image side: Stage 2 trains it"),
        (672, ADDED, "new here"),
    )
    for left, colours, words in legend:
        page.box(left, 525, 16, 16, "", colours)
        page.words(left + 23, 533, words, 11.5, ha="left", va="center_baseline")
    return page.figure


def draw_forward(page: Drawing, text_row: float, image_row: float) -> None:
    """The text side, the image side beneath it, and where each looks at the other; rows are their middles."""
    rows = (
        (text_row, TEXT, "16 prompts:\n“a photo of a nut.”\n“a broken nut.” …", "text blocks,\nadapters", "anchors"),
        (image_row, IMAGE, "an image", "ViT blocks,\nadapters", "V1 … V4,\ndet"),
    )
    added = (
        (text_row, "text cross-\nattention", "anomaly\nmap"),
        (image_row, "image cross-\nattention", "detection\nscore"),
    )
    for row, side, given, tower, result in rows:
        page.words(57, row, given, 11.5)
        page.box(130, row - 26, 112, 52, tower, side)
        page.box(280, row - 26, 96, 52, result, side)
        for start, end in ((116, 130), (242, 280), (376, 520)):
            page.arrow((start, row), (end, row), colour=side[0])
    for row, module, result in added:
        page.box(520, row - 28, 124, 56, module, ADDED, weight="bold")
        page.box(718, row - 28, 112, 56, result, PLAIN, weight="bold")
        page.arrow((644, row), (718, row))
    middle = (text_row + image_row) / 2
    page.arrow((352, image_row - 26), (352, middle), (556, middle), (556, text_row + 28), colour=IMAGE[0])
    page.words(346, middle, "each patch and\nits like", 11.5, ha="right", colour=IMAGE[0])
    page.arrow((608, text_row + 28), (608, image_row - 28), colour=TEXT[0])
    page.words(616, middle, "where the prompts\nfind a defect", 11.5, ha="left", colour=TEXT[0])


def draw_loops(page: Drawing, top: float) -> None:
    """The base, loops 1, 2 and N, and what Stage 1 looks at in each."""
    row, feet = top + 62, top + 146
    page.box(0, row - 31, 74, 62, "base\nmodel", PLAIN)
    page.words(37, row + 44, "loop_0.pth", 11)
    lefts = {"1": 100, "2": 352, "N": 622}
    for loop, left in lefts.items():
        page.box(left, top, 208, 116, "", ("#BBBBBB", "white"))
        page.words(left + 104, top + 14, f"loop {loop}: loop_{loop}.pth", 11.5)
        page.box(left + 10, row - 31, 84, 66, "Stage 1:\ntext side", TEXT)
        page.box(left + 114, row - 31, 84, 66, "Stage 2:\nimage side", IMAGE)
        page.arrow((left + 94, row), (left + 114, row), colour=TEXT[0])
    page.arrow((74, row), (100, row))
    page.arrow((308, row), (352, row))
    page.arrow((560, row), (580, row))
    page.words(592, row, "…", 16)
    page.arrow((602, row), (622, row))
    # What Stage 1 looks at.
    page.box(lefts["1"] + 4, feet, 96, 32, "frozen CLIP", FROZEN, size=11.5)
    page.arrow((lefts["1"] + 52, feet), (lefts["1"] + 52, row + 35), colour=FROZEN[0])
    for here, there in (("1", "2"), ("2", "N")):
        start, end = lefts[here] + 156, lefts[there] + 52
        page.arrow((start, row + 35), (start, feet + 8), (end, feet + 8), (end, row + 35), colour=ADDED[0], width=2)
        page.words((start + end) / 2, feet + 22, "feedback: V1 … V4", 11.5, colour=ADDED[0], weight="bold")
    page.words(
        WIDTH / 2, feet + 50, "Nothing is reset: all modules go on from stage to stage and from loop to loop.", 11.5
    )


# page.png


def draw_page(run: Path, data_root: str) -> None:
    """The page of app.py as a browser shows it after a click on an example, down to the end of its results."""
    from playwright.sync_api import sync_playwright

    path, command = PICTURES / "page.png", [sys.executable, "app.py", "--ckpt", str(run), "--data_root", data_root]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": WIDTH})
            page.goto(server.stdout.readline().strip() if server.stdout else "")
            page.locator("#examples button").nth(PAGE_EXAMPLE).click()
            page.locator("#results article").wait_for()
            page.locator(".progress-text").wait_for(state="detached")
            end = page.locator("#results").bounding_box() or {"y": 0, "height": WIDTH}
            clip: Any = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"]}
            page.screenshot(path=path, full_page=True, clip=clip)
        finally:
            server.terminate()
    shrink(path)


# what the pictures share


def read(data: DataSet, class_name: str, index: int, detector: Detector) -> tuple[Image.Image, np.ndarray, Tensor]:
    """Image, mask [H, W] of 0 and 1, and the pixels that the model takes, [1, 3, S, S]."""
    image, mask = read_record(data.folder, data.of_class(class_name)[index])
    defect = np.zeros((image.height, image.width)) if mask is None else np.asarray(mask) / 255
    return image, defect, Transform(detector.model.backbone.img_size)(image, mask)[0][None]


def blank(width: float, height: float) -> Figure:
    """A white page, in pixels of a README page."""
    return Figure(figsize=(width / 100, height / 100), facecolor="white")


def panel(figure: Figure, x: float, y: float, width: float, height: float | None = None) -> Axes:
    """Axes without marks at a place in pixels of a README page, y from above."""
    height = height or width
    page_width, page_height = 100 * figure.get_size_inches()
    axes = figure.add_axes((x / page_width, 1 - (y + height) / page_height, width / page_width, height / page_height))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def title(axes: Axes, words: str) -> None:
    axes.set_title(words, fontsize=POINTS * 12, color=INK, pad=4)


def scale(figure: Figure, drawn: AxesImage, x: float, y: float, width: float, words: str) -> None:
    """The colours of a picture, with numbers, beneath it."""
    bar = figure.colorbar(drawn, cax=panel(figure, x, y, width, 8), orientation="horizontal")
    bar.set_label(words, fontsize=POINTS * 11, color=INK, labelpad=1)
    bar.ax.tick_params(labelsize=POINTS * 10.5, length=2, pad=2, colors=INK)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    bar.outline.set_visible(False)


def save(figure: Figure, name: str) -> None:
    path = PICTURES / name
    figure.savefig(path, dpi=100 * DENSITY)
    shrink(path)


def shrink(path: Path) -> None:
    """Bring a picture to 256 colours, dithered: half of the bytes, and no difference to the eye."""
    with Image.open(path) as picture:
        full = picture.convert("RGB")
    few = full.quantize(palette=full.quantize(kmeans=1), dither=Image.Dither.FLOYDSTEINBERG)
    few.putpalette([255 if value > 250 else value for value in few.getpalette() or []])  # white stays white
    few.save(path, optimize=True)
    print(f"{path}: {few.width} x {few.height} px, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    args = parse_arguments()
    if args.shrink:
        shrink(args.shrink)
        return
    if args.page:
        draw_page(args.run, str(args.data_root))
        return
    data = open_dataset("demo_test", args.data_root)
    detectors = load_detectors(args.run, data)
    save(draw_strip(detectors, data), "strip.png")
    save(draw_prompts(detectors, data), "prompts.png")
    save(draw_method(), "method.png")


if __name__ == "__main__":
    main()
