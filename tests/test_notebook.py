"""The notebook runs from top to bottom in a fresh copy, and what is committed of it is short, whole and clean."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from docs.run_notebook import NOTEBOOK, execute
from model.config import REPOSITORY

# All that the notebook uses; nothing in it was trained or rendered but the demo's base.
FOLDERS = ("ckpt/demo", "dataset", "docs", "model", "utils")
PARTS = ["Load", "Predict", "Look", "Train one loop", "Compare", "Report"]
MOST_BYTES = 300_000


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository."""
    folder = tmp_path_factory.mktemp("notebook") / "copy"
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in REPOSITORY.glob("*.py"):
        shutil.copy(script, folder)
    return folder


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: NotebookNode) -> list[set[str]]:
    """Of what kinds the outputs of each code cell are: text of a stream, or pictures."""
    return [{output.get("name", output.output_type) for output in cell.outputs} for cell in code(notebook)]


def test_runs_from_top_to_bottom_in_a_fresh_copy(committed, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("AACLIP_DATA_ROOT", str(tmp_path))
    executed = execute(copy / "docs" / NOTEBOOK.name)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in committed.cells]
    assert kinds(executed) == kinds(committed)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"demo_train", "demo_test"}
    made = copy / "ckpt/quickstart"
    assert (made / "loop_1.pth").is_file() and (made / "report_demo_test_quickstart.html").is_file()


def test_has_its_parts_in_order(committed):
    words = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## \d\. (.+)$", words, re.MULTILINE) == PARTS


def test_committed_outputs_are_whole_and_small(committed):
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))
    assert set().union(*kinds(committed)) == {"stdout", "display_data", "execute_result"}
    assert NOTEBOOK.stat().st_size <= MOST_BYTES


def test_committed_outputs_tell_nothing_of_a_machine(committed):
    assert set(committed.metadata) == {"kernelspec"} and not any(cell.metadata for cell in committed.cells)
    texts = [output.text for cell in code(committed) for output in cell.outputs if "text" in output]
    assert texts and not re.findall(r"(?<![\w.])/\w+/|[A-Z]:\\|~/|0x[0-9a-f]{6}", "\n".join(texts))


def test_links_lead_to_files(committed):
    words = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)#\s]+)", words)
    assert targets and not [target for target in targets if not (NOTEBOOK.parent / target).is_file()]
