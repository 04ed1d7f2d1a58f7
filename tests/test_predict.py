"""predict.py and its Python interface: own images without a data set."""

import csv
import errno
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import predict as module
from dataset.images import read_image
from predict import Detector, find_images


@pytest.fixture
def images(tmp_path, data_root):
    """A folder with three images of two sizes, one of them in a folder of its own, and a text file."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.JPG", "more/a.png")):
        image = Image.open(data_root / "small" / "candle" / f"{number % 2}_{number}.png")
        image.resize((60 + 20 * number, 50)).save(folder / name, "JPEG" if name.endswith("JPG") else "PNG")
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return folder


def test_images_are_files_folders_and_patterns(images):
    found = find_images([str(images)], Path("predictions"))
    assert {path.relative_to(images).as_posix(): name for path, name in found.items()} == {
        "a.png": "a",
        "b.JPG": "b",
        "more/a.png": "more_a",
    }
    both = find_images([str(images / "a.png"), str(images / "**" / "*.png")], Path("predictions"))
    assert sorted(both.values()) == ["a", "a__2"] and len(both) == 2
    for text in (str(images / "*"), str(images / "**" / "*")):
        assert not {path.name for path in find_images([text], Path("predictions"))} & {"notes.txt", "more"}
    Image.new("RGB", (9, 9)).save(images / "a__2.png")
    names = [
        name.casefold()
        for name in find_images([str(images), str(images / "more" / "a.png")], Path("predictions")).values()
    ]
    assert len(set(names)) == len(names) == 4
    with pytest.raises(FileNotFoundError, match="no image there"):
        find_images([str(images / "*.gif")], Path("predictions"))


def test_files_in_folders_that_are_not_read_are_said(images, caplog):
    (images / "c.heic").touch()
    (images / ".hidden").touch()
    (images / "d.png").symlink_to(images / "nowhere.png")
    assert len(find_images([str(images)], Path("predictions"))) == 3
    assert "3 files in folders are no images by their names, or lead nowhere" in caplog.text
    assert "c.heic" in caplog.text and "d.png" in caplog.text and "hidden" not in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text, or longer than some systems allow")
def test_names_of_any_kind_have_results(scripts, run, tmp_path, capsys):
    folder = tmp_path / "desk"
    deep = folder.joinpath(*["drawer of many old things " + "x" * 60] * 12)
    deep.mkdir(parents=True)
    names = [
        folder / ("n" * 250 + ".png"),
        folder / "new\nline.png",
        folder / os.fsdecode(b"\xb5\xc4.png"),
        deep / "a.png",
    ]
    for path in names:
        Image.new("RGB", (20, 20)).save(path)
    for _ in range(2):
        out = folder / "out"
        assert predict(scripts, "--ckpt", run / "loop_1.pth", "--images", folder, "--save_path", out) == 0
        assert len(list(out.glob("*.png"))) == len(list(out.glob("*.npy"))) == 4
        assert "\\udcb5" in capsys.readouterr().out


def test_what_cannot_be_written_of_one_image_stops_no_other(scripts, run, images, tmp_path, monkeypatch, capsys):
    original = module.replacing

    def refused(path):
        if path.name.startswith("a_"):
            raise OSError(errno.EIO, "broken sector", str(path))
        return original(path)

    monkeypatch.setattr(module, "replacing", refused)
    assert predict(scripts, "--ckpt", run / "loop_1.pth", "--images", images, "--save_path", tmp_path / "out") == 1
    assert "1 of 3 images could not be judged" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.npy"))) == 2


def test_a_full_disk_is_named_and_ends_the_call(scripts, run, images, tmp_path, monkeypatch, capsys):
    original = module.replacing

    @contextmanager
    def full(path):
        if path.suffix == ".npy":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        with original(path) as file:
            yield file

    monkeypatch.setattr(module, "replacing", full)
    assert predict(scripts, "--ckpt", run / "loop_1.pth", "--images", images, "--save_path", tmp_path / "p") == 2
    assert capsys.readouterr().err.count("The disk is full: ") == 1


def test_what_was_judged_before_a_stop_is_written(scripts, run, images, tmp_path, monkeypatch, capsys):
    judged = Detector.__call__
    calls = []

    def stop(self, image):
        calls.append(image)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judged(self, image)

    monkeypatch.setattr(Detector, "__call__", stop)
    words = [
        "predict",
        "--ckpt",
        run / "loop_1.pth",
        "--images",
        images,
        "--device",
        "cpu",
        "--save_path",
        tmp_path / "p",
    ]
    assert scripts(*words) == 1
    assert "Stopped." in capsys.readouterr().err
    with open(tmp_path / "p" / "predictions.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_a_model_that_is_named_twice_judges_once(scripts, run, images, tmp_path):
    assert (
        predict(scripts, "--ckpt", run, run / "loop_1.pth", "--images", images / "a.png", "--save_path", tmp_path) == 0
    )
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["x/loop_0 (base)", "x/loop_1", "x/loop_2"]


def test_a_photograph_is_turned_once(run, images):
    photo, upright = images / "photo.png", images / "upright.png"
    image = Image.open(images / "a.png").convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(photo, exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(upright)
    detector = Detector.load(run / "loop_2.pth", class_name="candle", device="cpu")
    expected = detector(upright)
    for given in (photo, read_image(photo), Image.open(photo)):
        assert np.array_equal(detector(given).map, expected.map)


def predict(scripts, *words: object) -> int:
    return scripts("predict", *words, "--device", "cpu")


def test_scores_maps_pictures_and_a_table(scripts, run, images, tmp_path, capsys):
    out = tmp_path / "out"
    ckpts = [run / "loop_0.pth", run / "loop_2.pth"]
    assert predict(scripts, "--ckpt", *ckpts, "--images", images, "--class_name", "candle", "--save_path", out) == 0
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["x/loop_0 (base)", "x/loop_2"] * 3
    for row in rows:
        values = np.load(out / row["map"])
        assert values.shape == (64, 64) and values.max() == pytest.approx(float(row["highest_map_value"]))
        assert 0 <= float(row["single_score"]) <= 1 and row["decision"] in ("normal", "anomalous")
    assert {path.name for path in out.glob("*.png")} == {"a.png", "b.png", "more_a.png"}
    assert "x/loop_2" in capsys.readouterr().out


def test_three_lines_of_python_say_the_same(scripts, run, images, tmp_path):
    out, ckpt = tmp_path / "out", run / "loop_1.pth"
    assert predict(scripts, "--ckpt", ckpt, "--images", images, "--class_name", "candle", "--save_path", out) == 0
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    detector = Detector.load(ckpt, class_name="candle", device="cpu")
    for image in (images / "a.png", str(images / "a.png"), read_image(images / "a.png")):
        verdict = detector(image)
        assert verdict.single_score == pytest.approx(float(row["single_score"]), abs=1e-6)
        assert verdict.probability == pytest.approx(float(row["probability"]), abs=1e-6)
        assert verdict.anomalous == (row["decision"] == "anomalous")
        assert np.allclose(verdict.map, np.load(out / row["map"]), atol=1e-4)
    with Image.open(images / "a.png") as opened:
        assert detector(opened).single_score == detector(images / "a.png").single_score
    with pytest.raises(ValueError, match="Name one of its files"):
        Detector.load(run, device="cpu")
    with pytest.raises(ValueError, match="expected industrial or medical"):
        Detector.load(ckpt, domain="medcal", device="cpu")


def test_an_unreadable_image_is_reported_and_the_others_go_on(scripts, run, images, tmp_path, capsys):
    (images / "b.JPG").write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict(scripts, "--ckpt", run / "loop_2.pth", "--images", images, "--save_path", out) == 1
    err = capsys.readouterr().err
    assert "b.JPG: not readable as an image" in err and "1 of 3 images could not be judged" in err
    assert sorted(path.name for path in out.glob("*.png")) == ["a.png", "more_a.png"]


def test_a_base_without_calibration_decides_nothing(scripts, base, images, tmp_path, capsys):
    folder = tmp_path / "silent"
    folder.mkdir()
    for name in ("text_adapter.pth", "image_adapter.pth"):
        content = torch.load(base / name, weights_only=True)
        content.pop("calibration", None)
        torch.save(content, folder / name)
    out = tmp_path / "out"
    assert predict(scripts, "--ckpt", folder, "--images", images / "a.png", "--save_path", out) == 0
    text, err = capsys.readouterr()
    assert "n/a" in text and "without a calibration" in err
    assert not Detector.load(folder, device="cpu")(images / "a.png").anomalous


def test_a_folder_is_searched_through_links_and_without_what_is_no_photograph(scripts, run, images, tmp_path, capsys):
    linked = tmp_path / "elsewhere"
    linked.mkdir()
    shutil.copy(images / "a.png", linked / "c.png")
    (images / "more" / "link").symlink_to(linked, target_is_directory=True)
    (linked / "back").symlink_to(images, target_is_directory=True)
    for hidden in ("._a.png", ".thumbnails/a.png"):
        (images / hidden).parent.mkdir(exist_ok=True)
        (images / hidden).write_bytes(b"no photograph")
    command = ["--ckpt", run / "loop_2.pth", "--images", images, "--save_path", images / "predictions"]
    tables = []
    for _ in range(2):  # the second time its own pictures lie there
        assert predict(scripts, *command) == 0
        tables.append((images / "predictions" / "predictions.csv").read_text(encoding="utf-8"))
    assert tables[0] == tables[1] and tables[0].count("loop_2") == 2 * 4
    assert "link/c.png" in tables[0] and "predictions/a.png" not in tables[0]
    pattern = [*command[:3], f"{images}/**/*.png", *command[4:]]
    assert predict(scripts, *pattern) == 0
    assert "predictions/a.png" not in (images / "predictions" / "predictions.csv").read_text(encoding="utf-8")
    assert predict(scripts, *command[:4], "--save_path", images) == 2
    assert "is the folder of --images" in capsys.readouterr().err


def test_nothing_to_judge_ends_with_2(scripts, run, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(scripts, "--ckpt", run / "loop_2.pth", "--images", tmp_path / "gone", "--save_path", out) == 2
    assert "no image there" in capsys.readouterr().err and not out.exists()
