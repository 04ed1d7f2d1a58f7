"""torch.hub: the program from any folder, beside modules of other people that are called as its own."""

import ast
import json
import subprocess
import sys

import pytest
import torch

from model.config import REPOSITORY
from predict import Detector

PROGRAM = """
import json, sys
import torch
{first}
repository, ckpt, image = sys.argv[1:]
detector = torch.hub.load(repository, "detector", source="local", ckpt=ckpt, class_name="candle", device="cpu")
model = torch.hub.load(repository, "model", source="local", ckpt=ckpt, device="cpu")
import dataset, model as own_model, utils.tools
alone, (first, second) = detector(image), detector([image, image])
assert not [name for name in sys.modules if name.startswith(("utils.judging", "dataset.images", "forward_utils"))]
print(json.dumps({{
    "mine": [dataset.MINE, own_model.MINE, utils.tools.MINE],
    "score": alone.single_score,
    "same": [first.single_score, second.single_score],
    "kind": type(model).__name__,
    "path": [entry for entry in sys.path if entry == repository],
    "modules": sorted(name for name in sys.modules if name.partition(".")[0] in ("dataset", "model", "utils")),
}}))
"""


@pytest.mark.parametrize("first", ["", "import dataset, model, utils, utils.tools"], ids=["later", "earlier"])
def test_it_works_beside_modules_of_the_same_names(run, data_root, tmp_path, first):
    (tmp_path / "utils").mkdir()
    for name in ("dataset.py", "model.py", "utils/__init__.py", "utils/tools.py"):
        (tmp_path / name).write_text(f"MINE = '{name}'\n", encoding="utf-8")
    (tmp_path / "caller.py").write_text(PROGRAM.format(first=first), encoding="utf-8")
    image = data_root / "small" / "candle" / "1_0.png"
    words = [sys.executable, "caller.py", str(REPOSITORY), str(run / "loop_2.pth"), str(image)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    expected = Detector.load(run / "loop_2.pth", class_name="candle", device="cpu")(image)
    assert said["mine"] == ["dataset.py", "model.py", "utils/tools.py"]
    assert said["score"] == pytest.approx(expected.single_score, abs=1e-6)
    assert said["same"] == pytest.approx([expected.single_score] * 2, abs=1e-6)
    assert said["kind"] == "CrossAttentionCLIP" and said["path"] == []
    assert said["modules"] == ["dataset", "model", "utils", "utils.tools"]


def test_modules_that_are_here_already_are_used(run, monkeypatch):
    given = {"source": "local", "ckpt": run / "loop_2.pth", "device": "cpu"}
    assert type(torch.hub.load(str(REPOSITORY), "detector", **given)) is Detector
    monkeypatch.delitem(sys.modules, "utils.judging")  # of which not all is imported yet
    detector = torch.hub.load(str(REPOSITORY), "detector", **given)
    assert type(detector) is sys.modules["utils.judging"].Detector


def test_a_wrong_checkpoint_is_named(tmp_path):
    for entry in ("detector", "model"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            torch.hub.load(str(REPOSITORY), entry, source="local", ckpt=tmp_path / "gone.pth")


def test_nothing_of_the_program_is_imported_while_it_judges():
    """Afterwards `import utils` finds another's."""
    own = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} | {"forward_utils_cross_attention"}
    files = [REPOSITORY / "forward_utils_cross_attention.py"]
    files += [path for name in ("model", "dataset", "utils") for path in (REPOSITORY / name).rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = [part.module or "" for part in ast.walk(node) if isinstance(part, ast.ImportFrom)]
                inner += [name.name for part in ast.walk(node) if isinstance(part, ast.Import) for name in part.names]
                assert not [name for name in inner if name.partition(".")[0] in own], path
