"""What was judged and looked at, as HTML whose pictures are part of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from utils.page.judge import Judgement, picture
from utils.page.looks import Look
from utils.report.plots import MAP_COLOURS

FOLDER = Path(__file__).parent
STYLE = FOLDER / "page.css"
# Colours of a drawn scale; a browser fills in those between.
STOPS = 9


def stops(colours: str) -> str:
    """The colours of a scale from low to high, as CSS lists them."""
    return ", ".join(to_hex(colormaps[colours](number / (STOPS - 1))) for number in range(STOPS))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)
_ENVIRONMENT.globals["stops"] = stops
# The macros of the template.
_PIECES: Any = _ENVIRONMENT.get_template("page.html").module


def results(judgement: Judgement, threshold: float) -> str:
    """A row for each photograph: it, the maps, and what is said at `threshold`; nothing where there is none."""
    return _PIECES.results(judgement, threshold, MAP_COLOURS)


def looks(name: str, image: Image.Image, found: Sequence[Look]) -> str:
    """What was looked at in a photograph."""
    return _PIECES.looks(name, picture(image), image.size, found)


def messages(errors: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """What went wrong, and what is to be known."""
    return _PIECES.messages(errors, remarks)
