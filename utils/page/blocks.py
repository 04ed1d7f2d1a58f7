"""The page itself: what stands where, and what happens at a click."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dataset.sets import DataSet
from utils.page import html
from utils.page.judge import MOST_FILES, Judgement, judge
from utils.page.looks import look
from utils.page.models import ANYTHING, PageModels, known_classes
from utils.verdicts import decision_word

TITLE = "AA-CLIP with cross-attention"
WELCOME = (
    f"# {TITLE}\nZero-shot anomaly detection: drop photographs and say what they show. "
    "All is computed on this computer, and nothing is sent anywhere."
)
# Seconds that an upload is kept for, and between two looks for older ones.
KEPT, LOOK = 3600, 300
# Models see one request at a time, whoever sent it.
TURN: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
EXAMPLES = 8
PROGRESS = gr.Progress()
# System fonts: none is fetched.
THEME = gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


class Actions:
    """What happens at clicks. It keeps the models alone: what a person sent is in the state of their page."""

    def __init__(self, models: PageModels, examples: Sequence[tuple[Path, str]]):
        self.models, self.examples = models, examples

    def slider(self, name: str) -> dict[str, Any]:
        """The threshold where the calibration of a model has it; it cannot be moved where there is none."""
        fitted = self.models.detectors[name].calibration
        return gr.update(value=0.5 if fitted is None else round(fitted.threshold, 3), interactive=fitted is not None)

    def example(self, number: int) -> tuple[list[str], str]:
        """The file of an example, and what it shows."""
        path, class_name = self.examples[number]
        return [str(path)], class_name

    def judge(
        self,
        files: list[str] | None,
        class_name: str | None,
        name: str,
        threshold: float,
        progress: gr.Progress = PROGRESS,
    ) -> tuple[Any, ...]:
        """Messages, the judgement, its HTML, the photographs to choose from, and nothing looked at yet.

        All but the messages stay as they are where the class cannot stand in a prompt.
        """
        paths = [Path(file) for file in files or []]
        try:
            pair = self.models.pair(name, class_name or "")
        except ValueError as error:
            return html.messages([str(error)]), *[gr.skip()] * 4
        found = judge(pair, progress.tqdm(paths[:MOST_FILES], unit="photographs"))
        errors, remarks = [*found.failed], []
        if len(paths) > MOST_FILES:
            errors.append(f"{len(paths)} photographs: expected at most {MOST_FILES}; the others were left out.")
        if unknown := self.models.unknown_words(class_name or ""):
            remarks.append(f"This CLIP knows nothing of these words: {', '.join(unknown)}.")
        choices = [(shown.name, number) for number, shown in enumerate(found.shown)]
        chosen = gr.update(choices=choices, value=0 if choices else None)
        return html.messages(errors, remarks), found, html.results(found, threshold), chosen, ""

    def decide(self, judgement: Judgement, threshold: float) -> str:
        """The same results at another threshold."""
        return html.results(judgement, threshold)

    def look(self, judgement: Judgement, number: int | None, class_name: str | None, name: str) -> str:
        """What the chosen model looked at in a photograph, or why that is not known."""
        if number is None:
            return html.messages(["No photograph: drop one above."])
        shown = judgement.shown[number]
        try:
            chosen = list(self.models.pair(name, class_name or "").values())[-1]
            return html.looks(shown.name, *look(chosen, shown.path))
        except ValueError as error:
            return html.messages([str(error).replace(str(shown.path), shown.name)])


def _controls(models: PageModels, max_upload: int) -> tuple[gr.File, gr.Dropdown, gr.Dropdown, gr.Slider]:
    """Photographs, what they show, the loop and the threshold."""
    names = list(models.detectors)
    with gr.Row():
        label = f"Photographs, up to {MOST_FILES} of {max_upload} MB"
        files = gr.File(label=label, file_count="multiple", height=190, elem_id="files")
        with gr.Column():
            class_name = gr.Dropdown(
                known_classes(models.domain),
                value=ANYTHING,
                allow_custom_value=True,
                label="What they show: choose or type",
                elem_id="class_name",
            )
            name = gr.Dropdown(names, value=names[-1], label="Loop, beside its base", elem_id="model")
            threshold = gr.Slider(0, 1, step=0.001, label="Threshold of the decision", elem_id="threshold")
    return files, class_name, name, threshold


def make_page(models: PageModels, examples: Sequence[tuple[Path, str]], max_upload: int) -> gr.Blocks:
    """The page; `examples`: files and what they show, `max_upload` in MB, which is only said here."""
    actions = Actions(models, examples)
    with gr.Blocks(title=TITLE, delete_cache=(LOOK, KEPT)) as page:
        gr.Markdown(WELCOME)
        files, class_name, name, threshold = given = _controls(models, max_upload)
        samples = gr.Dataset(
            components=[gr.Image(visible=False)],
            samples=[[str(path)] for path, _ in examples],
            label="Examples" if examples else "Examples: none, the demo was not rendered",
            type="index",
            elem_id="examples",
        )
        messages = gr.HTML(elem_id="messages")
        judgement = gr.State(Judgement([], []))
        results = gr.HTML(elem_id="results")
        with gr.Accordion("What each prompt looked at", open=False, elem_id="looks"):
            chosen = gr.Dropdown([], label="Photograph", elem_id="chosen")
            show = gr.Button("Show", elem_id="show")
            looks = gr.HTML(elem_id="looked")
        ask = {
            "fn": actions.judge,
            "inputs": list(given),
            "outputs": [messages, judgement, results, chosen, looks],
            "show_progress_on": results,
            **TURN,
        }
        gr.on([files.upload, files.delete, files.clear, class_name.input], trigger_mode="always_last", **ask)
        page.load(actions.slider, name, threshold, api_visibility="private")
        name.input(actions.slider, name, threshold, api_visibility="private").then(**ask)
        samples.click(actions.example, samples, [files, class_name], api_visibility="private").then(**ask)
        threshold.input(
            actions.decide,
            [judgement, threshold],
            results,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
        show.click(actions.look, [judgement, chosen, class_name, name], looks, **TURN)
    return page


def copy_examples(data: DataSet, folder: Path) -> list[tuple[Path, str]]:
    """Copies of some images of a data set in `folder`, normal and anomalous in turn, and what they show."""
    found = []
    for number, (class_name, words) in enumerate(list(data.descriptions.items())[:EXAMPLES]):
        for record in [record for record in data.of_class(class_name) if record.label == number % 2][:1]:
            source = data.folder / record.image_path
            path = folder / f"{class_name}_{decision_word(bool(record.label))}{source.suffix}"
            shutil.copyfile(source, path)
            found.append((path, words))
    return found
