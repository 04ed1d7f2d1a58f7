"""predict.py and its Python interface: own images without a data set."""

import csv
import errno
import json
import os
import queue
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import predict as module
from dataset.images import read_image
from predict import Detector
from utils.inference import results
from utils.inference.images import find_images
from utils.inference.watch import watch
from utils.verdicts import find_regions, verdicts_on


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
    original = results.replacing

    def refused(path):
        if path.name.startswith("a_"):
            raise OSError(errno.EIO, "broken sector", str(path))
        return original(path)

    monkeypatch.setattr(results, "replacing", refused)
    assert predict(scripts, "--ckpt", run / "loop_1.pth", "--images", images, "--save_path", tmp_path / "out") == 1
    assert "1 of 3 images could not be judged" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.npy"))) == 2


def test_a_full_disk_is_named_and_ends_the_call(scripts, run, images, tmp_path, monkeypatch, capsys):
    original = results.replacing

    @contextmanager
    def full(path):
        if path.suffix == ".npy":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        with original(path) as file:
            yield file

    monkeypatch.setattr(results, "replacing", full)
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


# several images, regions


def test_a_list_of_images_of_any_kind_is_judged_in_batches(run, images):
    detector = Detector.load(run / "loop_2.pth", class_name="candle", device="cpu")
    path = images / "a.png"
    with Image.open(path) as opened:
        given = [
            path,
            str(images / "b.JPG"),
            opened,
            np.asarray(opened.convert("RGB")),
            np.asarray(opened.convert("L")),
        ]
        found = detector(given, batch_size=2)
        alone = [detector(image) for image in given]
    assert [verdict.size for verdict in found] == [(60, 50), (80, 50), (60, 50), (60, 50), (60, 50)]
    for one, other in zip(found, alone, strict=True):
        assert one.single_score == pytest.approx(other.single_score, abs=1e-6)
        assert np.allclose(one.map, other.map, atol=1e-4)
    assert np.array_equal(found[0].map, found[2].map) and np.array_equal(found[0].map, found[3].map)
    assert detector([]) == [] and len(detector((path,))) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)], r"image 1: pixels of type uint8 and shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"the image: pixels of type uint8 and shape \[2, 4, 4, 3\]"),
        (np.zeros((4, 4, 3)), "the image: pixels of type float64"),
        (np.zeros((0, 4, 3), np.uint8), "the image: expected pixels, found none"),
        ([3], "image 0: expected a file, a Pillow image or an array, found int"),
    ],
)
def test_what_is_no_image_is_named(run, given, words):
    detector = Detector.load(run / "loop_1.pth", device="cpu")
    with pytest.raises(ValueError, match=words):
        detector(given)


def test_regions_are_connected_parts_above_the_threshold_in_pixels_of_the_image():
    values = np.zeros((8, 8), np.float32)
    values[1:3, 2:5] = 2
    values[3, 5] = 5  # touches over a corner
    values[6, 0] = 3
    first, second = find_regions(values, 2, (16, 32))
    assert first.box == (4, 4, 8, 12) and first.area == 7 * 8 and first.peak == 5
    assert second.box == (0, 24, 2, 4) and second.area == 8 and second.peak == 3
    (around,) = second.outline
    assert len(around) == 8 and 0 <= min(around[::2]) < max(around[::2]) <= 2 and min(around[1::2]) >= 24
    assert find_regions(values, 5.1, (16, 32)) == []
    assert find_regions(values, -1, (16, 32))[0].box == (0, 0, 16, 32)


def test_regions_are_written_as_json_and_in_coco_format(scripts, run, images, tmp_path):
    out, ckpts = tmp_path / "out", [run / "loop_0.pth", run / "loop_2.pth"]
    words = ["--ckpt", *ckpts, "--images", images, "--class_name", "candle", "--save_path", out, "--regions"]
    for _ in range(2):
        assert predict(scripts, *words) == 0
    found = json.loads((out / "regions.json").read_text(encoding="utf-8"))
    assert [record["model"] for record in found] == ["x/loop_0 (base)", "x/loop_2"] * 3
    detector = Detector.load(ckpts[1], class_name="candle", device="cpu")
    verdict = detector(images / "a.png")
    assert found[1]["width"] == 60 and found[1]["decision"] in ("normal", "anomalous")
    assert [region["peak"] for region in found[1]["regions"]] == pytest.approx([r.peak for r in verdict.regions])
    coco = json.loads((out / "coco_x_loop_2.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in coco["images"]] == [record["image"] for record in found[1::2]]
    assert len(coco["annotations"]) == sum(len(record["regions"]) for record in found[1::2])
    threshold = verdict.highest
    assert predict(scripts, *words[:-1]) == 0 and not (out / "regions.json").exists()  # they were of another call
    assert predict(scripts, *words[:-1], "--map_threshold", threshold) == 2
    assert predict(scripts, *words, "--map_threshold", threshold) == 0
    found = json.loads((out / "regions.json").read_text(encoding="utf-8"))
    assert len(found[1]["regions"]) == 1 and found[1]["regions"][0]["peak"] == pytest.approx(threshold)


def test_regions_need_a_threshold(scripts, base, images, tmp_path, capsys):
    folder = tmp_path / "older"
    folder.mkdir()
    for name in ("text_adapter.pth", "image_adapter.pth"):
        content = torch.load(base / name, weights_only=True)
        if "calibration" in content:
            del content["calibration"]["map_threshold"]
        torch.save(content, folder / name)
    words = ["--ckpt", folder, "--images", images, "--save_path", tmp_path / "out", "--regions"]
    assert predict(scripts, *words) == 2
    assert "give --map_threshold" in capsys.readouterr().err
    assert Detector.load(folder, device="cpu")(images / "a.png").regions is None
    assert predict(scripts, *words, "--map_threshold", 0) == 0


def test_outlines_go_along_the_edges_of_pixels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        for region in find_regions(rng.random((6, 6)), 0.7, (6, 6)):
            x, y = (np.concatenate([around[axis::2] for around in region.outline]) for axis in (0, 1))
            left, top, width, height = region.box
            assert (x.min(), y.min(), x.max(), y.max()) == (left, top, left + width, top + height)


def test_regions_of_an_image_read_at_reduced_size_are_in_its_own_pixels(run, tmp_path, data_root):
    path = tmp_path / "large.jpg"
    Image.open(data_root / "small" / "candle" / "1_0.png").resize((1600, 1600)).save(path)
    whole, reduced = (
        Detector.load(run / "loop_2.pth", class_name="candle", device="cpu", reduced_jpeg=reduced)
        for reduced in (False, True)
    )
    threshold = np.percentile(whole(path).map, 90)
    one, other = (replace(detector, map_threshold=threshold)(path) for detector in (whole, reduced))
    assert one.size == other.size == (1600, 1600)
    assert np.allclose(one.regions[0].box, other.regions[0].box, atol=60)
    assert verdicts_on(path, [whole, reduced])[reduced.name].single_score == other.single_score


# a folder that fills up


class Watched:
    """predict.py --watch in a thread of a test; lines come as they are printed."""

    def __init__(self, monkeypatch):
        self.lines: queue.Queue = queue.Queue()
        monkeypatch.setattr(module, "print", lambda text, flush: self.lines.put(json.loads(text)), raising=False)

    def names(self, count: int) -> list[str]:
        return [Path(self.lines.get(timeout=30)["image"]).name for _ in range(count)]


def test_images_of_a_folder_are_judged_as_they_come(scripts, run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.inference.watch.PATIENCE", 2.5)
    monkeypatch.setattr("utils.inference.watch.SETTLED", 0.5)
    folder, said = tmp_path / "line", Watched(monkeypatch)
    folder.mkdir()
    shutil.copy2(images / "a.png", folder / "there.png")
    whole = (images / "b.JPG").read_bytes()

    def happen():
        try:
            assert said.names(1) == ["there.png"]
            shutil.move(images / "more" / "a.png", folder / "moved.png")
            assert said.names(1) == ["moved.png"]
            with open(folder / "slow.jpg", "wb") as file:  # written in two parts, with a rest that looks like an end
                file.write(whole[: len(whole) // 2])
                file.flush()
                time.sleep(1.2)
                file.write(whole[len(whole) // 2 :])
            assert said.names(1) == ["slow.jpg"]
            (folder / "broken.png").write_bytes(b"no image")
            line = said.lines.get(timeout=30)
            assert Path(line["image"]).name == "broken.png" and "not readable as an image" in line["error"]
            os.replace(images / "b.JPG", folder / "slow.jpg")
            shutil.copy2(images / "a.png", folder / "broken.png")
            assert sorted(said.names(2)) == ["broken.png", "slow.jpg"]
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor() as pool:
        happened = pool.submit(happen)
        words = ["--ckpt", run / "loop_1.pth", "--watch", folder, "--class_name", "candle"]
        assert predict(scripts, *words) == 1  # one was broken
        happened.result()
    assert said.lines.empty()


def test_a_folder_that_is_gone_for_a_while_is_judged_once(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.inference.watch.POLL", 0.001)
    monkeypatch.setattr("utils.inference.watch.SETTLED", 0)
    folder, elsewhere = tmp_path / "line", tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"an image")
    judged: list[str] = []

    def judge(path: Path, last: bool) -> bool:
        judged.append(path.name)
        if judged == ["a.png"]:
            (folder / "b.png").write_bytes(b"another image")  # while it waits for its turn
        return True

    # A look before each of them.
    happens = iter([None, None, lambda: folder.rename(elsewhere), None, lambda: elsewhere.rename(folder), None, None])

    def stopped() -> bool:
        if len(judged) < 2:
            return False
        event = next(happens, "end")
        if callable(event):
            event()
        return event == "end"

    watch(folder, judge, stopped)
    assert judged == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--regions",), "--regions: --watch writes no files"),
        (("--save_path", "x"), "--save_path: --watch writes no files"),
        (("--images", "x"), "not allowed with argument"),
    ],
)
def test_what_does_not_go_with_watching(scripts, run, tmp_path, words, expected, capsys):
    assert predict(scripts, "--ckpt", run / "loop_1.pth", "--watch", tmp_path, *words) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_to_watch_must_be_there(scripts, run, tmp_path, capsys):
    assert predict(scripts, "--ckpt", run / "loop_1.pth", "--watch", tmp_path / "gone") == 2
    assert "no such folder" in capsys.readouterr().err
