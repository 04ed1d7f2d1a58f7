"""The comparison as one HTML file that needs no other file and no network."""

import base64
import io
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from dataset.sets import DataSet
from utils.bootstrap import CONFIDENCE
from utils.comparison import Row, comparison, difference, result
from utils.evaluation import AVERAGE, Tested
from utils.metrics import COLUMNS
from utils.plots import draw_training
from utils.tables import notes, percent, titles

TEMPLATE = Path(__file__).with_name("report.html")
# Pixels a side, of the format.
WEBP_LIMIT = 16383


@dataclass(frozen=True)
class Chapter:
    """What a report has of one data set. `per_class`: {class: (the last model, its difference from the base)}."""

    name: str
    images: int
    title: str
    not_zero_shot: list[str]
    average: list[Row]
    answers: list[str]
    per_class: dict[str, tuple[Row, Row | None]]
    notes: list[str]
    curves: Path | None
    sheets: list[Path]
    one_image: list[Path]

    @classmethod
    def of(
        cls, tested: list[Tested], data: DataSet, sheets: list[Path], curves: Path | None, one_image: list[Path]
    ) -> "Chapter":
        """From the results in hand, of which those by class are the last model's."""
        subject = tested[-1]
        return cls(
            name=data.name,
            images=len(data.records),
            title=titles(data, AVERAGE),
            not_zero_shot=[each.name for each in tested if each.was_trained_on(data) is True],
            average=comparison(tested, data, AVERAGE),
            answers=[_answer(difference(subject, title, AVERAGE)) for title in subject.references],
            per_class={
                name: (result(subject, name), difference(subject, "base", name) if not subject.is_base else None)
                for name in subject.classes
            },
            notes=notes(tested, data),
            curves=curves,
            sheets=sheets,
            one_image=one_image,
        )


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


def write_report(tested: list[Tested], chapters: list[Chapter]) -> Path:
    """Write report_<data sets>.html beside the last checkpoint."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "inline": inline, "words": _words}
    folders = dict.fromkeys(each.folder for each in tested if (each.folder / "log.csv").is_file())
    trainings = [(folder, folder / "training.png") for folder in folders]
    path = tested[-1].folder / f"report_{'_'.join(chapter.name for chapter in chapters)}.html"
    content = environment.get_template(TEMPLATE.name).render(
        subject=tested[-1].name,
        tested=tested,
        chapters=chapters,
        columns=COLUMNS,
        groups=list(dict.fromkeys(group for group, _ in COLUMNS.values())),
        confidence=f"{CONFIDENCE:.0%}",
        trainings=[(folder, picture) for folder, picture in trainings if draw_training(folder / "log.csv", picture)],
        command=shlex.join(["python", *sys.argv]),
    )
    path.write_text(content, encoding="utf-8")
    return path
