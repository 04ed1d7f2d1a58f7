"""What is found by reading all files of a data set first: bit depths, broken files, pages, sizes of masks."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset import check
from dataset.images import brightest, read_image, read_record, take_pixels
from dataset.loading import AnomalyDataset, cache_images
from dataset.records import Record
from dataset.sets import open_dataset
from dataset.survey import survey, with_bits
from dataset.transforms import Transform
from predict import Detector
from tests.conftest import EPOCHS, listing, write_small_dataset


@pytest.fixture
def root(tmp_path) -> Path:
    write_small_dataset(tmp_path / "small", per_kind=4)
    return tmp_path


def deepen(folder: Path, bits: int, colour: bool = False) -> None:
    """The images of a small data set as of a camera of so many bits, in files of 16."""
    for path in folder.rglob("*.png"):
        if not path.stem.endswith("_mask"):
            values = np.asarray(Image.open(path).convert("RGB" if colour else "L")).astype(float)
            values = values[..., ::-1] if colour else values  # OpenCV's order
            cv2.imwrite(str(path), (values * (2**bits - 1) / 255).round().astype(np.uint16))


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# bit depths


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_depth_is_that_of_the_whole_set(root, caplog, colour, bits):
    folder = root / "small"
    records = open_dataset("small", root).records
    plain = [Image.open(folder / record.image_path).convert("RGB" if colour else "L") for record in records]
    before = [np.asarray(image.convert("RGB")) for image in plain]
    deepen(folder, bits, colour)
    found = with_bits(folder, records, None)
    assert {record.bits for record in found} == {bits}
    assert caplog.text.count(f"taken for images of {bits} bits") == (bits < 16)
    for record, pixels in zip(found, before, strict=True):
        assert np.abs(np.asarray(read_image(folder / record.image_path, record.bits)).astype(int) - pixels).max() <= 1
    assert {record.bits for record in with_bits(folder, records, 14)} == {14}
    assert found == records and repr(found) == repr(records)  # the same images, read in another way
    if bits == 16:
        with pytest.raises(ValueError, match="which are more than 12 bits; give another --bits"):
            for record in with_bits(folder, records, 12):
                read_image(folder / record.image_path, record.bits)


def test_one_bright_pixel_among_dark_images_is_said(root, caplog, monkeypatch, capsys):
    deepen(root / "small", 12)
    data = open_dataset("small", root)
    path = data.folder / data.records[0].image_path
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    values[0, 0] = 65535
    cv2.imwrite(str(path), values)
    assert {record.bits for record in with_bits(data.folder, data.records, None)} == {16}
    assert "most images of 16 bits have 12 bits, but one has values up to 65535" in caplog.text
    monkeypatch.setattr(sys, "argv", ["check", "small", "--data_root", str(root)])
    assert check.main() == 1
    assert "dark images: small, most images of 16 bits have 12 bits" in capsys.readouterr().out


def test_dark_images_are_told_apart_and_a_set_is_looked_at_once(root, monkeypatch, capsys):
    for number, path in enumerate(sorted((root / "small" / "candle").glob("0_?.png"))):
        cv2.imwrite(str(path), np.full((40, 48), 100 + number, dtype=np.uint16))
    monkeypatch.setattr(sys, "argv", ["check", "small", str(root / "small"), "--data_root", str(root)])
    assert check.main() == 1
    assert "same image" not in capsys.readouterr().out


def test_images_of_8_bits_have_no_depth(root):
    records = open_dataset("small", root).records
    assert brightest(root / "small" / records[0].image_path) is None
    assert with_bits(root / "small", records, None) is records


def test_scores_do_not_depend_on_the_bits_of_the_files(scripts, root, base, capsys, monkeypatch):
    command = ["test", "--ckpt", base, "--dataset", "small", "--device", "cpu", "--resamples", "5"]
    for path in (root / "small").rglob("?_?.png"):
        Image.open(path).convert("L").save(path)
    assert scripts(*command, data_root=root) == 0
    expected = table(base / "base_small_images.csv")
    assert "of 16 bits" not in capsys.readouterr().err
    deepen(root / "small", 12)
    assert scripts(*command, data_root=root) == 0
    assert capsys.readouterr().err.count("so they are taken for images of 12 bits") == 1
    found = table(base / "base_small_images.csv")
    for row, other in zip(found, expected, strict=True):
        assert float(row["single_score"]) == pytest.approx(float(other["single_score"]), abs=1e-3)
    one = ["--class_name", "candle", "--image_idx", "0"]
    assert scripts(*command, *one, data_root=root) == 0  # one image alone is as bright as in the set
    assert capsys.readouterr().err.count("so they are taken for images of 12 bits") == 1
    monkeypatch.setattr(sys, "argv", ["check", "small", "--data_root", str(root)])
    assert check.main() == 1
    assert "dark images: small, images of 16 bits have values up to" in capsys.readouterr().out
    # predict.py sees one image at a time: it warns, and is told.
    images = root / "small" / "candle" / "0_0.png"
    predict = ["predict", "--ckpt", base, "--images", images, "--class_name", "candle", "--device", "cpu"]
    assert scripts(*predict, "--save_path", root / "dark") == 0
    assert "If their camera has 12, give --bits 12." in capsys.readouterr().err
    assert scripts(*predict, "--save_path", root / "bright", "--bits", "12") == 0
    assert "camera" not in capsys.readouterr().err
    (row,) = (row for row in found if row["image"].endswith("candle/0_0.png"))
    score = float(table(root / "bright" / "predictions.csv")[0]["single_score"])
    assert score == pytest.approx(float(row["single_score"]), abs=1e-5)


def test_a_depth_holds_in_memory_and_from_the_files(root):
    deepen(root / "small", 12)
    data = open_dataset("small", root)
    records = with_bits(data.folder, data.records, None)
    transform = Transform(32)
    cache = cache_images(data.folder, records, transform)
    for kept in (None, cache):
        item = AnomalyDataset(data.folder, records, transform, kept)[0]
        assert item["image"].max() > AnomalyDataset(data.folder, data.records, transform)[0]["image"].max() + 0.5


def test_known_good_images_have_the_depth_of_the_set(root, run):
    detector = Detector.load(run / "loop_1.pth", class_name="candle", device="cpu")
    path = root / "small" / "candle" / "0_0.png"
    Image.open(path).convert("L").save(path)
    expected = detector.seeing({"candle": [path]}).known["candle"]
    deepen(root / "small", 12)
    dark, bright = (replace(detector, bits=bits).seeing({"candle": [path]}).known["candle"] for bits in (16, 12))
    for level, other, wrong in zip(expected, bright, dark, strict=True):
        assert 10 * (level - other).abs().mean() < (level - wrong).abs().mean()


# broken files


def spoil(folder: Path) -> None:
    (folder / "metal_nut" / "0_0.png").write_bytes(b"\x89PNG broken")
    Image.new("L", (48, 40)).save(folder / "candle" / "1_0_mask.png")


def test_broken_files_are_left_out_where_that_is_asked_for(root, caplog):
    spoil(root / "small")
    data = open_dataset("small", root)
    with pytest.raises(
        ValueError, match=r"0_0.png: not readable.* And 1 more are broken; --skip_broken leaves them out"
    ):
        survey(data.folder, data.records)
    kept = survey(data.folder, data.records, skip_broken=True)
    assert len(kept) == len(data.records) - 2
    assert "2 of 16 images are left out" in caplog.text and "1_0_mask.png: the mask" in caplog.text
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        survey(data.folder, [record for record in data.records if record.image_path == "metal_nut/0_0.png"], True)


def test_missing_files_are_broken_ones(scripts, root, base, tmp_path, capsys):
    (root / "small" / "candle" / "1_0_mask.png").unlink()
    test = ["test", "--ckpt", base, "--dataset", "small", "--device", "cpu", "--resamples", "5"]
    test += ["--save_path", tmp_path / "results"]
    assert scripts(*test, data_root=root) == 2
    said = capsys.readouterr().err
    assert "the first is 'candle/1_0_mask.png', the mask of 'candle/1_0.png'" in said and "--skip_broken" in said
    assert scripts(*test, "--skip_broken", data_root=root) == 0
    assert "candle/1_0_mask.png: not readable as a mask (no such file)" in capsys.readouterr().err


def test_training_and_testing_go_on_without_broken_files(scripts, root, tmp_path, capsys):
    spoil(root / "small")
    small = ["--dataset", "small", "--device", "cpu"]
    train = ["train", *small, "--model_name", "demo", *EPOCHS, "--save_path", tmp_path / "base"]
    assert scripts(*train, data_root=root) == 2
    assert "--skip_broken leaves them out" in capsys.readouterr().err and not (tmp_path / "base").exists()
    assert scripts(*train, "--skip_broken", "--shot", "4", data_root=root) == 0
    assert "2 of 16 images are left out" in capsys.readouterr().err
    drawn = (tmp_path / "base" / "4-shot.jsonl").read_text(encoding="utf-8")
    assert "metal_nut/0_0.png" not in drawn and "candle/1_0.png" not in drawn
    test = ["test", "--ckpt", tmp_path / "base", *small, "--resamples", "5"]
    assert scripts(*test, data_root=root) == 2
    assert scripts(*test, "--skip_broken", data_root=root) == 0
    assert len(table(tmp_path / "base" / "base_small_images.csv")) == 14


# what is said of files


def test_pages_and_sizes_of_masks_are_said_once(root, caplog, monkeypatch, capsys):
    folder = root / "small"
    first, second = (Image.open(folder / "candle" / f"0_{n}.png").convert("RGB") for n in (0, 1))
    first.save(folder / "candle" / "0_0.tif", save_all=True, append_images=[second])
    text = (folder / "full-shot.jsonl").read_text(encoding="utf-8").replace("candle/0_0.png", "candle/0_0.tif")
    (folder / "full-shot.jsonl").write_text(text, encoding="utf-8")
    Image.open(folder / "candle" / "1_0_mask.png").resize((24, 20)).save(folder / "candle" / "1_0_mask.png")
    data = open_dataset("small", root)
    survey(data.folder, data.records)
    assert "1 images are files of several pages, the first of which is read: candle/0_0.tif" in caplog.text
    assert (
        "1 of 8 masks have another size than their image, and are stretched to it: candle/1_0_mask.png" in caplog.text
    )
    assert np.array_equal(np.asarray(read_image(folder / "candle" / "0_0.tif")), np.asarray(first))
    monkeypatch.setattr(sys, "argv", ["check", "small", "--data_root", str(root)])
    assert check.main() == 1
    assert "several pages: small, 1 images are files of several pages" in capsys.readouterr().out


def test_more_pixels_are_read_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("AACLIP_MAX_PIXELS", "100")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    Image.new("RGB", (20, 10)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="too many pixels; --max_pixels takes more"):  # Pillow's own limit
        read_image(tmp_path / "x.png")
    take_pixels(200)
    assert read_image(tmp_path / "x.png").size == (20, 10)
    take_pixels(150)
    with pytest.raises(ValueError, match="expected at most 150 pixels; --max_pixels takes more"):
        survey(tmp_path, [Record("x.png", 0, "x")])


# where results go


def test_results_go_where_they_are_asked_to(scripts, run, tmp_path, data_root, capsys):
    before = listing(run)
    command = ["test", "--ckpt", run / "loop_2.pth", "--dataset", "small", "--device", "cpu", "--resamples", "5"]
    copy = shutil.copytree(run, tmp_path / "other" / run.name)
    assert scripts(*command, "--control", copy, "--pictures", 1, "--report", "--save_path", tmp_path / "out") == 0
    assert listing(run) == before
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {"x/loop_0_small.csv", "x/loop_2_small.csv", "x__2/loop_2_small.csv", "x/report_small.html"} <= files
    assert {"x/comparison_small.json", "x/pictures_small/candle.png", "x/training.png"} <= files
    (tmp_path / "file").touch()
    assert scripts(*command, "--save_path", tmp_path / "file") == 2
    assert "is no folder" in capsys.readouterr().err


# masks


def test_in_a_lossy_set_every_grey_mask_is_cut(tmp_path, caplog):
    """Discs show that they were resized; a thin scratch and a spot alone do not."""
    y, x = np.mgrid[:200, :200]
    true = {f"disc{n}": (y - 60 - n) ** 2 + (x - 70) ** 2 < 30**2 for n in range(3)}
    true |= {f"scratch{n}": (abs(y - x + n) < 4) & (x > 20) & (x < 180) for n in range(3)}
    folder = tmp_path / "masks"
    folder.mkdir()
    records = []
    for name, defect in true.items():
        Image.new("RGB", (100, 100)).save(folder / f"{name}.png")
        whole = Image.fromarray(defect.astype(np.uint8) * 255)
        whole.resize((100, 100), Image.Resampling.BICUBIC).save(folder / f"{name}_mask.png")
        records.append(Record(f"{name}.png", 1, "part", f"{name}_mask.png"))
    found = survey(folder, records)
    assert found == records and all(record.lossy for record in found)
    assert "6 of 6 masks are grey around their edges" in caplog.text
    for record, defect in zip(found, true.values(), strict=True):
        share = (np.asarray(read_record(folder, record)[1]) > 0).mean()
        assert share == pytest.approx(defect.mean(), rel=0.15)
    caplog.clear()
    alone = survey(folder, records[3:])  # of which none shows it
    assert not any(record.lossy for record in alone) or "masks are grey" in caplog.text


def test_masks_of_nearly_all_the_image_are_doubted(root, caplog, monkeypatch, capsys):
    data = open_dataset("small", root)
    record = next(record for record in data.records if record.mask_path)
    path = data.folder / record.mask_path
    Image.fromarray(255 - np.asarray(Image.open(path).convert("L"))).save(path)
    assert survey(data.folder, data.records) == data.records
    words = f"1 of 8 masks call more than 75% of their image a defect: {record.mask_path}. Are they inverted"
    assert caplog.text.count(words) == 1
    monkeypatch.setattr(sys, "argv", ["check", "small", "--data_root", str(root)])
    assert check.main() == 1
    assert "doubtful masks: small, 1 of 8 masks call" in capsys.readouterr().out


# pixels


def test_a_detector_takes_pixels(base, data_root):
    detector = Detector.load(base, class_name="candle", device="cpu")
    path = data_root / "small" / "candle" / "1_0.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(detector(pixels).map, detector(path).map)
    assert np.array_equal(detector(pixels[..., ::-1]).map, detector(np.ascontiguousarray(pixels[..., ::-1])).map)
    assert np.array_equal(detector(pixels[..., 0]).map, detector(np.repeat(pixels[..., :1], 3, axis=-1)).map)
    for wrong in (pixels / 255, pixels.astype(np.uint16), pixels[..., :2], pixels[None], np.moveaxis(pixels, -1, 0)):
        with pytest.raises(ValueError, match="expected uint8"):
            detector(wrong)


def test_records_keep_their_depth_beside_their_lists(root):
    record = open_dataset("small", root).records[0]
    assert replace(record, bits=12) == record and "bits" not in repr(replace(record, bits=12))


def test_testing_and_predicting_agree_on_each_format(scripts, root, base, tmp_path):
    images = sorted((root / "small" / "candle").glob("0_?.png"))
    (tmp_path / "kinds").mkdir()
    turned = Image.Exif()
    turned[274] = 6
    kinds = {
        **{suffix: {} for suffix in ("bmp", "gif", "jp2", "jpg", "pgm", "ppm", "tif", "webp", "jfif")},
        "png": {"exif": turned},
    }
    lines = []
    for number, (suffix, options) in enumerate(kinds.items()):
        image = Image.open(images[number % len(images)]).convert("L" if suffix == "pgm" else "RGB")
        kind = "JPEG" if suffix == "jfif" else None
        image.save(tmp_path / "kinds" / f"{number}.{suffix}", kind, **options)
        lines.append({"image_path": f"{number}.{suffix}", "label": number % 2, "class_name": "candle"})
    (tmp_path / "kinds" / "full-shot.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    command = ["--ckpt", base, "--device", "cpu", "--save_path"]
    test = ["test", *command, tmp_path / "tested", "--dataset", tmp_path / "kinds", "--class_name", "candle"]
    assert scripts(*test, "--resamples", 5) == 0
    predict = ["predict", *command, tmp_path / "predicted", "--images", tmp_path / "kinds", "--class_name", "candle"]
    assert scripts(*predict) == 0
    (path,) = (tmp_path / "tested").rglob("*_images.csv")
    tested = {row["image"]: float(row["single_score"]) for row in table(path)}
    predicted = {
        Path(row["image"]).name: float(row["single_score"]) for row in table(tmp_path / "predicted" / "predictions.csv")
    }
    assert tested.keys() == predicted.keys() == {line["image_path"] for line in lines}
    assert all(predicted[name] == pytest.approx(score, abs=1e-5) for name, score in tested.items())
