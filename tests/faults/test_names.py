"""Names, sizes and arguments that nobody meant: no file replaces another, and a terminal sees no control character."""

import csv
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.commands import PlainFormatter
from dataset.sets import open_dataset
from dataset.words import is_harmless, on_one_line, printable
from tests.conftest import EPOCHS, listing, write_small_dataset
from utils.files import safe_name, unused_names, write_csv
from utils.report.plots import Example, Panel, draw_examples
from utils.report.tables import latex_text

CLASSES = ("average", "Average.", "a/b", "a_b", "A*B", "loops", "=1+1", "$x^$", "con")


# names


@given(st.lists(st.text(min_size=1, max_size=300), unique=True, max_size=8))
def test_no_two_names_are_one_file(texts):
    names = unused_names(texts, taken=("loops",))
    assert len({name.casefold() for name in names.values()} | {"loops"}) == len(texts) + 1
    for name in names.values():
        assert re.fullmatch(r"[\w.-]+", name) and len(name.encode()) < 140 and not name.startswith(".")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "con", "com¹", "NUL.png", "a" * 300, "é" * 200, "\udc80", "a\x00b", "x."]
)
def test_every_name_is_a_file_name_on_every_system(tmp_path, name):
    safe = safe_name(name)
    (tmp_path / f"{safe}.png").touch()
    assert safe.split(".")[0].casefold() not in ("con", "nul", "com¹") and safe == safe_name(name)
    assert safe_name("a" * 300) != safe_name("a" * 301)


def test_letters_that_are_composed_make_no_other_file():
    names = unused_names(["caf\u00e9", "cafe\u0301", "CAF\u00c9", "\uff21", "a"])
    assert len({unicodedata.normalize("NFKC", name).casefold() for name in names.values()}) == 5


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A data set with classes of odd names, in folders of plain ones."""
    root = tmp_path_factory.mktemp("odd")
    folder = write_small_dataset(root / "odd", per_kind=2, classes=tuple(f"c{n}" for n in range(len(CLASSES))))
    path = folder / "full-shot.jsonl"
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for entry in entries:
        entry["class_name"] = CLASSES[int(entry["class_name"][1:])]
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return root


def test_every_class_has_its_row_and_its_picture(scripts, run, odd, tmp_path, capsys):
    command = ["--ckpt", run / "loop_1.pth", "--dataset", "odd", "--device", "cpu", "--resamples", 5, "--pictures", 1]
    assert scripts("test", *command, data_root=odd) == 0
    with open(run / "loop_1_odd.csv", newline="", encoding="utf-8") as file:
        names = [row["class"] for row in csv.DictReader(file)]
    assert sorted(names) == sorted(
        ["average.", "Average..", "a/b", "a_b", "A*B", "loops", "'=1+1", "$x^$", "con", "average"]
    )
    assert names[-1] == "average"
    content = json.loads((run / "comparison_odd.json").read_text(encoding="utf-8"))
    assert len(content["rows"]) == len(CLASSES) + 1
    pictures = [path.name for path in (run / "pictures_odd").iterdir()]
    assert len({name.casefold() for name in pictures} - {"loops.png"}) == len(CLASSES)


def test_a_table_is_no_formula_and_no_macro(tmp_path):
    rows = [{"name": text, "value": -1.5} for text in ("=1+1", "+x", "-x", "@x", "\tx", "x=1")]
    write_csv(tmp_path / "x.csv", rows)
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "x=1"]
    assert {row["value"] for row in found} == {"-1.5"}
    assert latex_text("a\\b^c~d") == "a\\textbackslash{}b\\textasciicircum{}c\\textasciitilde{}d"
    assert latex_text("[x]*") == "{}[x]*" and latex_text("*") == "{}*"
    assert on_one_line("a\nb\tc\u00a0d") == "a\\nb\\tc\u00a0d"
    assert latex_text("50 % & $x_1$ {#}") == "50 \\% \\& \\$x\\_1\\$ \\{\\#\\}"


@given(st.text())
def test_nothing_but_lines_and_columns_reaches_a_terminal(text):
    shown = printable(text)
    assert all(is_harmless(c) or c in "\n\t" for c in shown)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Zl", "Zp"} - {unicodedata.category("\n")}
    assert printable(shown) == shown
    assert PlainFormatter().format(logging.LogRecord("x", 0, "", 0, "%s", (text,), None)) == shown


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_control_characters_of_names_are_shown_as_escapes(scripts, run, tmp_path, capsys):
    folder = write_small_dataset(tmp_path / "plain", per_kind=1)
    name = "metal_nut/\x1b[2Jx.png"
    (folder / "metal_nut" / "0_0.png").rename(folder / name)
    path = folder / "full-shot.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("metal_nut/0_0.png", json.dumps(name)[1:-1]), "utf-8")
    assert scripts("test", "--dataset", "plain", "--list_images", data_root=tmp_path) == 0
    assert "\\x1b[2Jx.png" in (said := capsys.readouterr().out) and "\x1b" not in said
    command = ["--images", folder / "metal_nut", "--ckpt", run / "loop_1.pth", "--device", "cpu"]
    assert scripts("predict", *command, "--save_path", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\\x1b[2Jx.png" in said.out
    (folder / "bro\x1bken.png").write_bytes(b"x")
    assert scripts("predict", "--images", folder / "bro\x1bken.png", *command[2:], "--save_path", tmp_path / "out") == 1
    assert "\x1b" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="without control characters"):
        for kind in ("good", "bad"):
            (tmp_path / "b\x07ell" / kind).mkdir(parents=True)
        open_dataset("b\x07ell", tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_who_has_read_enough_ends_it_quietly(data_root):
    command = [sys.executable, "test.py", "--dataset", "small", "--list_images", "--data_root", str(data_root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert "pipe" not in process.stderr.read().casefold() and process.wait() == 0


# what is never written over


def prepared(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.full((9, 9, 3), 90, dtype=np.uint8)).save(folder / name)
    return folder


def test_results_never_take_the_place_of_an_input(scripts, run, tmp_path, capsys):
    command = ["predict", "--ckpt", run / "loop_1.pth", "--device", "cpu", "--images"]
    folder = prepared(tmp_path / "own", ("a.png", "b.jpg"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for images, message in ((folder, "is the folder of --images"), (folder / "a.png", "a.png is there already")):
        assert scripts(*command, images, "--save_path", folder) == 2
        assert message in capsys.readouterr().err
    other = prepared(tmp_path / "elsewhere", ("a.png",))
    assert scripts(*command, other / "a.png", "--save_path", folder) == 2  # its picture would be own/a.png
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    table = prepared(tmp_path / "table", ()) / "predictions.csv"
    table.write_text("mine,1\n", encoding="utf-8")
    assert scripts(*command, other, "--save_path", table.parent) == 2 and table.read_text() == "mine,1\n"

    results = tmp_path / "results"
    for _ in range(2):  # its own results it replaces
        assert scripts(*command, folder / "b.jpg", "--save_path", results) == 0
    assert scripts(*command, results / "b.png", "--save_path", results) == 2  # but not where one is judged
    assert "b.png is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", ""], "expected a name or a path, found ''"),
        (["--ckpt", " "], "expected a name or a path, found ' '"),
        (["--class_name", ""], "expected a name, without control characters"),
        (["--class_name", "a\x1bb"], "expected a name, without control characters"),
        (["--save_path", "FILE"], "is no folder"),
        (["--save_path", "FILE/x"], "is no folder"),
        (["--ckpt", "RUN/loop_7.pth"], "loop_0.pth, loop_1.pth, loop_2.pth"),
        (["--images", "-x.png"], "expected at least one argument"),
        (["-x.png"], "is given as ./-NAME"),
        (["--images", "FILE/*.txt"], "nothing in predictions, where the results go"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_read(
    scripts, run, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(prepared(tmp_path / "own", ("a.png",)))
    Path("FILE").touch()
    words = [word.replace("RUN", str(run)) for word in words]
    command = ["--ckpt", run / "loop_1.pth", "--images", "a.png", "--device", "cpu"]
    assert scripts("predict", *command, *words) == 2
    assert message in capsys.readouterr().err and sorted(os.listdir()) == ["FILE", "a.png"]


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="links")
def test_a_link_among_results_is_replaced_and_not_followed(scripts, run, tmp_path):
    folder, results = prepared(tmp_path / "own", ("a.png", "c.png")), tmp_path / "results"
    command = ["predict", "--ckpt", run / "loop_1.pth", "--device", "cpu", "--save_path", results, "--images"]
    assert scripts(*command, folder / "a.png") == 0
    before = (folder / "c.png").read_bytes()
    (results / "a.png").unlink()
    (results / "a.png").symlink_to(folder / "c.png")
    assert scripts(*command, folder / "a.png") == 0
    assert (folder / "c.png").read_bytes() == before and not (results / "a.png").is_symlink()


def test_maps_of_models_with_like_names_are_apart(scripts, run, tmp_path):
    folder = prepared(tmp_path / "own", ("a.png", "a_x.png"))
    command = ["predict", "--device", "cpu", "--save_path", tmp_path / "out", "--images", folder, "--ckpt"]
    assert scripts(*command, run / "loop_1.pth", run / "loop_2.pth") == 0
    with open(tmp_path / "out" / "predictions.csv", newline="", encoding="utf-8") as file:
        maps = [row["map"] for row in csv.DictReader(file)]
    assert len(set(maps)) == 4 and all((tmp_path / "out" / name).is_file() for name in maps)


# sizes


@pytest.mark.parametrize("size", [(2, 600), (600, 2), (1, 65_000), (30_000, 3)])
def test_elongated_images_cost_what_others_cost(scripts, run, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    started = time.monotonic()
    command = ["--ckpt", run / "loop_1.pth", "--device", "cpu", "--images", tmp_path / "x.png"]
    assert scripts("predict", *command, "--save_path", tmp_path / "out") == 0
    assert time.monotonic() - started < 10
    with Image.open(tmp_path / "out" / "x.png") as picture:
        assert max(picture.size) < 2000


def test_a_picture_has_a_bounded_size_and_no_formulas(tmp_path):
    panel = Panel(np.zeros((4, 4)), "$x^$ \\frac")
    examples = [Example("$y_$", np.zeros((n, 1, 3)), None, [panel]) for n in (1, 5000)]
    draw_examples(examples, ["$z^$"], "$", "a$b^", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert max(picture.size) < 2000


# arguments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name", "RN50"], "--model_name RN50"),
        (["--model_name", "hf-hub:a/b"], "open_clip has no such model"),
        (["--model_name", "local-dir:/etc"], "open_clip has no such model"),
        (["--lr_decay", "1e300"], "expected at most 2"),
        (["--lr_decay", "2", "--text_lr", "1e38", "--loops", "1000"], "is not finite"),
        (["--adapter_hidden", str(10**9)], "expected at most 65536"),
        (["--img_size", "80000"], "expected at most 4096"),
        (["--seed", str(2**64)], "expected at most"),
        (["--text_batch_size", "9" * 20], "expected at most"),
        (["--text_epoch", "9" * 20], "expected at most"),
        (["--loops", "1000000"], "expected at most 1000"),
        (["--text_lr", "nan"], "expected a finite number"),
        (["--shot", "9" * 30], "expected at most"),
        (["--num_workers", "9999"], "expected at most"),
        (["--surgery_until_layer", "99"], "expected 1 to"),
        (["--seed", "1" * 5000], "expected a whole number"),
        (["--text_batch_size", "1e3"], "'1e3': expected a whole number"),
        (["--save_path", ""], "expected a name or a path, found ''"),
        (["--class_name", "b\tc"], "without control characters"),
        (["@nowhere"], "a name that does is given as ./@NAME"),
    ],
)
def test_absurd_arguments_end_at_once_with_one_line(scripts, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model_name" in words else ["--model_name", "demo"]
    started = time.monotonic()
    assert scripts("train_cross_attention", *model, *words, "--dry_run") == 2
    assert time.monotonic() - started < 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.strip().splitlines()) == 1 and len(said.err) < 600 and not said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "meta"], "--device meta: not usable here"),
        (["--device", "nowhere"], "--device nowhere: not usable here"),
        (["--resamples", str(10**12)], "expected at most 100000"),
        (["--batch_size", "9" * 20], "expected at most"),
        (["--pictures", "1000000"], "expected at most 100"),
        (["--seed", str(2**64)], "expected at most"),
    ],
)
def test_absurd_arguments_of_a_test(scripts, run, tmp_path, capsys, words, message):
    before = listing(run)
    assert scripts("test", "--ckpt", run / "loop_1.pth", "--dataset", "small", *words) == 2
    assert message in capsys.readouterr().err and listing(run) == before


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text(f"@{path}", encoding="utf-8"),
        lambda path: path.write_text(f"@{path} @{path}\n@{path}", encoding="utf-8"),
        lambda path: path.write_text("\n".join(["--loops 1"] * 200_000), encoding="utf-8"),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
    ],
)
def test_a_file_of_arguments_that_has_no_end(scripts, base, tmp_path, capsys, write):
    path = tmp_path / "x.args"
    write(path)
    started = time.monotonic()
    assert scripts("train_cross_attention", f"@{path}", "--resume", base, "--loops", "0") == 2
    assert time.monotonic() - started < 3 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.usefixtures("no_estimates")
def test_a_dry_run_writes_nothing(scripts, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with io.StringIO() as said, pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", said)
        assert scripts("train_cross_attention", "--resume", base, *EPOCHS, "--loops", "1000", "--dry_run") == 0
    assert not list(tmp_path.iterdir())
