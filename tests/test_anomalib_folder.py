"""Folders as anomalib's `Folder` has them: read through it and through this program, and what does not pair."""

import json
import sys
from pathlib import Path

import pytest

from dataset import metadata
from dataset.commands import run_command
from dataset.sets import open_dataset
from tests.conftest import listing
from tests.test_layouts import picture, read_lines

# Trees, what anomalib's Folder is given for them, and whether our command can tell without.
KINDS = {"abnormal_dir": ["crack", "colour"], "mask_dir": ["mask/crack", "mask/colour"]}
TREES = {
    "one kind": (
        ["good/0.png", "good/1.png", "crack/0.png", "crack/1.png", "mask/crack/0.png", "mask/crack/1.png"],
        {"normal_dir": "good", "abnormal_dir": "crack", "mask_dir": "mask/crack"},
        True,
    ),
    "two kinds, masks with endings": (
        [
            *("good/00.jpg", "good/01.jpg", "crack/01.jpg", "crack/02.jpg", "colour/00.jpg"),
            *("mask/crack/01_mask.png", "mask/crack/02_mask.png", "mask/colour/00_mask.png"),
        ],
        {"normal_dir": "good", **KINDS},
        True,
    ),
    "one folder of masks for two kinds": (
        ["good/0.png", "colour/0.png", "crack/0.png", "mask/colour/0.png", "mask/crack/0.png"],
        {"normal_dir": "good", "abnormal_dir": ["crack", "colour"], "mask_dir": "mask"},
        True,
    ),
    "without masks": (
        ["good/0.png", "bad/1.png", "bad/lot 2/1.png"],
        {"normal_dir": "good", "abnormal_dir": "bad"},
        True,
    ),
    "names that tell nothing": (
        [
            *("train/0.png", "train/lot 7/0.png", "fine/1.png", "fine/a/1.png", "bent/10.png", "bent/2.png"),
            *("where/is_10.png", "where/is_2.png", "else/9.png"),
        ],
        {"normal_dir": "train", "normal_test_dir": ["fine"], "abnormal_dir": "bent", "mask_dir": "where"},
        False,
    ),
}


@pytest.fixture
def command(monkeypatch):
    """Calls dataset.metadata as from the command line; returns the exit code."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["metadata", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            run_command(metadata.main)
        return exit_info.value.code

    return call


def build(root: Path, names: list[str]) -> None:
    for name in names:
        picture(root / name, mask=name.startswith(("mask", "where")))


def flags_of(folders: dict[str, str | list[str]]) -> list[str]:
    """The flags of a command for what anomalib's Folder is given."""
    words = ([f"--{name}", *([given] if isinstance(given, str) else given)] for name, given in folders.items())
    return [word for flag in words for word in flag]


def read_by_anomalib(root: Path, folders: dict) -> set[tuple[str, int, str | None]]:
    """(image, label, mask) of what anomalib calls a test, or of all images where it would draw some of them."""
    data = pytest.importorskip("anomalib.data", reason="needs requirements/anomalib.txt")
    split = "test" if "normal_test_dir" in folders else None
    samples = data.FolderDataset("toy", root=root, split=split, **folders).samples
    rows = zip(samples.image_path, samples.label_index, samples.mask_path, strict=True)
    return {(image, int(label), mask or None) for image, label, mask in rows}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_read_as_anomalib_reads_it(tmp_path, command, capsys, caplog, name):
    caplog.set_level("INFO", "dataset")
    names, folders, speaks = TREES[name]
    root = tmp_path / "toy"
    build(root, names)
    expected = read_by_anomalib(root, folders)
    assert expected
    for words in [[], flags_of(folders)] if speaks else [flags_of(folders)]:
        assert command(root, *words, "--overwrite") == 0
        assert f"wrote {root / 'full-shot.jsonl'}" in capsys.readouterr().out
        assert {line["class_name"] for line in read_lines(root / "full-shot.jsonl")} == {"toy"}
        data = open_dataset(str(root), "nowhere")  # as test.py --dataset DIR
        found = {
            (str(root / record.image_path), record.label, record.mask_path and str(root / record.mask_path))
            for record in data.records
        }
        assert found == expected and len(data.records) == len(expected)
    assert ("images of --normal_dir are for training" in caplog.text) is ("normal_test_dir" in folders)
    assert command(root, *words) == 0 and "says the same" in capsys.readouterr().out


def test_a_list_of_own_images_is_kept(tmp_path, command, caplog, capsys):
    names, folders, _ = TREES["one kind"]
    build(tmp_path / "toy", names)
    line = {"image_path": "good/1.png", "label": 0, "class_name": "mine"}
    (tmp_path / "toy" / "full-shot.jsonl").write_text(json.dumps(line), encoding="utf-8")
    assert command(tmp_path / "toy", *flags_of(folders)) == 2
    assert "1 of its 1 lines are not in the folders, which have 4 more" in caplog.text
    assert read_lines(tmp_path / "toy" / "full-shot.jsonl") == [line]
    assert command(tmp_path / "toy", "--overwrite") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"  {'class':20}{'normal':>8}{'anomalous':>11}",
        f"  {'toy':20}{2:>8}{2:>11}",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--normal_dir", "good", "--abnormal_dir", "crack", "--mask_dir", "mask"],
            "expected as many masks as anomalous",
        ),
        (
            ["--normal_dir", "good", "--abnormal_dir", "crack", "--mask_dir", "mask/colour"],
            "in its place: anomalib pairs",
        ),
        (
            ["--normal_dir", "good", "--abnormal_dir", "crack", "bad", "--mask_dir", "mask/crack", "mask/of bad"],
            "expected the mask of 'bad/1.png', found 'mask/crack/1.png' in its place",
        ),
        (
            ["--normal_dir", "good", "--abnormal_dir", "crack", "--mask_dir", "mask/of bad"],
            "2, found 1, none for 'crack/2.png': anomalib pairs",
        ),
        (["--normal_dir", "good", "--mask_dir", "mask"], "--mask_dir without --abnormal_dir"),
        (["--abnormal_dir", "crack"], "expected the folder of good images, --normal_dir or --normal_test_dir"),
        (["--normal_dir", "god"], "--normal_dir god: expected images in "),
        (["--normal_dir", "../toy/good"], "--normal_dir ../toy/good: expected a folder in "),
        (["--normal_dir", "/good"], "--normal_dir /good: expected a folder in "),
        (["--normal_dir", ".", "--abnormal_dir", "crack"], "lies in a folder of good images and in one of anomalous"),
    ],
)
def test_what_does_not_pair_is_named(tmp_path, command, caplog, words, message):
    build(tmp_path / "toy", ["good/0.png", "crack/1.png", "crack/2.png", "mask/crack/1.png", "mask/crack/2.png"])
    build(tmp_path / "toy", ["mask/colour/3.png", "mask/colour/4.png", "bad/1.png", "mask/of bad/1.png"])
    before = listing(tmp_path)
    assert command(tmp_path / "toy", *words) == 2
    assert message in caplog.text and len(caplog.records) == 1
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy"], "'toy': expected a folder by its path, as ./NAME, or one of "),
        (["./toy.jsonl"], "'./toy.jsonl': expected a folder by its path"),
        (["MVTec", "--normal_dir", "good"], "--normal_dir: expected the path of one folder before it, found MVTec"),
        (["./a", "./b", "--mask_dir", "mask"], "--mask_dir: expected the path of one folder before it, found ./a ./b"),
    ],
)
def test_arguments_that_fit_no_folder_are_refused(command, capsys, words, message):
    assert command(*words) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_called_as_a_known_set_is_read_as_that(tmp_path, command, caplog, capsys):
    build(tmp_path / "mvtec_ad", ["grid/test/good/0.png", "grid/test/glue/1.png"])
    picture(tmp_path / "mvtec_ad/grid/ground_truth/glue/1_mask.png", mask=True)
    assert command(tmp_path / "mvtec_ad") == 0
    assert "DIFFERS: 21 + 57" in capsys.readouterr().out
    assert command(tmp_path / "mvtec_ad", "--normal_dir", "grid/test/good") == 2
    assert "called as MVTec, whose layout is known" in caplog.text
    assert command(tmp_path / "nothing") == 2
    assert "no such folder" in caplog.text
