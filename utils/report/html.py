"""Comparisons as one HTML file that needs no other file and no network."""

import base64
import io
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from dataset.files import write_text
from utils.files import safe_name
from utils.report.curves import draw_training
from utils.report.tables import block_title, notes, percent
from utils.testing.bootstrap import CONFIDENCE
from utils.testing.comparison import Comparison
from utils.testing.metrics import COLUMNS
from utils.testing.results import AVERAGE, Row

TEMPLATE = Path(__file__).with_name("report.html")
# Pixels a side, of the format.
WEBP_LIMIT = 16383


@dataclass(frozen=True)
class Chapter:
    """What a report has of one data set: the comparison and its pictures."""

    comparison: Comparison
    sheets: list[Path]
    curves: Path | None
    one_image: list[Path]

    @property
    def title(self) -> str:
        """What stands above the averages."""
        return block_title(self.comparison.data, AVERAGE)

    @property
    def average(self) -> list[Row]:
        """The rows of the average."""
        return self.comparison.rows[AVERAGE]

    @property
    def answers(self) -> list[str]:
        """Whether the subject differs from its base and its control, in words."""
        return [_answer(less[AVERAGE]) for less in self.comparison.subject.differences.values()]

    @property
    def per_class(self) -> dict[str, tuple[Row, Row | None]]:
        """{class: (the subject, its difference from the base)}."""
        subject = self.comparison.subject
        less = subject.differences.get("base", {})
        return {name: (subject.rows[name], less.get(name)) for name in subject.classes}

    @property
    def notes(self) -> list[str]:
        """What is to be said beneath."""
        return notes(self.comparison)


def _answer(row: Row) -> str:
    """What a difference of averages says, in words."""
    who = f"{row.of} {row.name}"
    if all(math.isnan(row.low[name]) for name in COLUMNS):
        return f"{who}: too few images for intervals."
    moved = [f"{_words(name)} {percent(row.values[name], True)}" for name in COLUMNS if row.is_sure(name)]
    if not moved:
        return f"{who}: no metric moves by more than the images of the test vary."
    return f"{who}, where the {CONFIDENCE:.0%} interval leaves out 0: {', '.join(moved)}."


def _words(metric: str) -> str:
    return " ".join(COLUMNS[metric])


def inline(path: Path) -> str:
    """A picture as a data URL, as WebP, which takes a tenth of a PNG file."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((WEBP_LIMIT, WEBP_LIMIT))
        picture.convert("RGB").save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(chapters: list[Chapter]) -> Path:
    """Write report_<data sets>.html beside the last checkpoint; all chapters are about the same models."""
    contenders = [result.contender for result in chapters[0].comparison.results]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "inline": inline, "words": _words}
    places = {contender.checkpoint.folder: contender.folder for contender in contenders}
    trainings = [(run, place / "training.png") for run, place in places.items() if (run / "log.csv").is_file()]
    subject, names = contenders[-1], "_".join(chapter.comparison.data.name for chapter in chapters)
    path = subject.folder / f"report_{safe_name(names)}.html"
    content = environment.get_template(TEMPLATE.name).render(
        subject=subject.name,
        contenders=contenders,
        chapters=chapters,
        columns=COLUMNS,
        groups=list(dict.fromkeys(group for group, _ in COLUMNS.values())),
        confidence=f"{CONFIDENCE:.0%}",
        trainings=[(run, picture) for run, picture in trainings if draw_training(run / "log.csv", picture)],
        command=shlex.join(["python", *sys.argv]),
    )
    return write_text(path, content)
