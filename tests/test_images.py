"""Image files and masks, augmentation, loading and the cache."""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, PngImagePlugin
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from dataset import check
from dataset.images import (
    as_rgb,
    read_defect,
    read_image,
    read_mask_pixels,
    read_record,
    reduced_for,
    size_on_disk,
)
from dataset.loading import AnomalyDataset, ImageCache, SeededSampler, cache_images, make_loader
from dataset.records import Record
from dataset.sets import open_dataset
from dataset.survey import survey, with_reduced_jpeg
from dataset.transforms import Transform
from tests.conftest import write_small_dataset
from tests.test_data import edit
from utils.checkpoints import load_checkpoint
from utils.errors import loader_message
from utils.files import read_csv

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


@pytest.fixture
def root(tmp_path) -> Path:
    write_small_dataset(tmp_path / "small", per_kind=4)
    return tmp_path


def test_empty_masks_and_unreadable_files(root):
    folder = root / "small"
    Image.new("L", (48, 40)).save(folder / "candle" / "1_0_mask.png")
    with pytest.raises(ValueError, match=r"1_0_mask.png: the mask of an anomalous image is empty"):
        survey(folder, open_dataset("small", root).records)
    (folder / "candle" / "1_1_mask.png").write_bytes(b"")
    with pytest.raises(ValueError, match="not readable as a mask"):
        read_defect(folder / "candle" / "1_1_mask.png")
    (folder / "metal_nut" / "0_0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"0_0.png: not readable as an image"):
        survey(folder, open_dataset("small", root).records)
    dataset = AnomalyDataset(folder, open_dataset("small", root).records, Transform(32))
    with pytest.raises(ValueError, match="not readable as an image"):
        dataset[0]
    with pytest.raises(ValueError) as error:
        next(iter(make_loader(dataset, 2, 1)))
    assert loader_message(error.value).startswith(f"{folder / 'metal_nut' / '0_0.png'}: not readable as an image")


def test_without_augmentation_images_are_resized_as_published():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8))
    mask = Image.fromarray((rng.random((50, 70)) > 0.7).astype(np.uint8) * 255)
    pixels, target = Transform(32)(image, mask)
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    assert torch.allclose(pixels, (torch.from_numpy(resized).permute(2, 0, 1) - MEAN) / STD, atol=1e-6)
    nearest = torch.from_numpy(np.array(mask.resize((32, 32), Image.Resampling.NEAREST)) != 0).float()
    assert torch.equal(target[0], nearest)
    assert type(pixels) is torch.Tensor and type(target) is torch.Tensor
    assert torch.equal(Transform(32)(image, None)[1], torch.zeros(1, 32, 32))


def image_that_is_its_mask(top: int, bottom: int) -> tuple[Image.Image, Image.Image, torch.Tensor]:
    """A white rectangle on black as image and mask, which can so be compared after any movement, and its pixels."""
    array = np.zeros((64, 64), dtype=np.uint8)
    array[top:bottom, 20:50] = 255
    mask = Image.fromarray(array)
    image = Image.merge("RGB", [mask] * 3)
    return image, mask, Transform(64)(image, mask)[0]


def augmented(
    image: Image.Image, mask: Image.Image, seed: int, augment: str = "published"
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return Transform(64, "text", augment)(image, mask)


def test_augmentation_moves_image_and_mask_together_and_fills_with_zero():
    image, mask, plain = image_that_is_its_mask(8, 30)
    white, black = plain.amax(dim=(1, 2)), plain.amin(dim=(1, 2))
    moved = filled = 0
    for seed in range(40):
        pixels, target = augmented(image, mask, seed)
        inside = target[0] > 0
        assert torch.allclose(pixels[:, inside], white.view(3, 1).expand(3, int(inside.sum())))
        outside = pixels[:, ~inside]
        is_black = torch.isclose(outside, black.view(3, 1)).all(dim=0)
        is_fill = (outside == 0).all(dim=0)
        assert (is_black | is_fill).all()
        moved += not torch.equal(pixels, plain)
        filled += bool(is_fill.any())
    # Each of four movements with p 0.5: 1 in 16 stays as it is; rotation and translation leave borders to fill.
    assert 30 <= moved <= 40 and 20 <= filled <= 38


def test_jitter_is_for_stage_2_alone_and_as_published():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(60, 190, (64, 64, 3), dtype=np.uint8))
    assert Transform(64, "text").jitter(image) is image
    transform, jittered = Transform(64, "image"), 0
    for seed in range(60):
        torch.manual_seed(seed)
        jittered += not torch.equal(transforms.pil_to_tensor(transform.jitter(image)), transforms.pil_to_tensor(image))
    assert 50 <= jittered <= 60  # one in 1 / 0.3^3 stays as it is
    kinds = [step.transforms[0] for step in Transform(64, "image").jitter.transforms]
    assert [k.brightness or k.contrast or k.saturation for k in kinds] == [(0.5, 1.5)] * 3
    assert [step.p for step in Transform(64, "image").jitter.transforms] == [0.7] * 3


def test_movements_are_the_published_ones_in_their_order():
    rotation, translation, horizontal, vertical = Transform(64, "text").move.transforms
    assert (rotation.p, translation.p, horizontal.p, vertical.p) == (0.5,) * 4
    assert rotation.transforms[0].degrees == [-30, 30]
    assert translation.transforms[0].translate == (0.15, 0.15) and translation.transforms[0].degrees == [0, 0]
    assert (type(horizontal), type(vertical)) == (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)


def test_items_tell_what_they_are(root):
    edit(root, lambda lines: lines[4].pop("mask_path"))
    dataset = AnomalyDataset(root / "small", open_dataset("small", root).records, Transform(32))
    normal, maskless, masked = dataset[0], dataset[4], dataset[5]
    assert (normal["label"], normal["has_mask"], normal["emptied"]) == (0, True, False)
    assert (maskless["label"], maskless["has_mask"]) == (1, False)
    assert (masked["has_mask"], masked["emptied"]) == (True, False) and masked["mask"].sum() > 0
    tiny = Image.new("L", (480, 400))
    tiny.putpixel((1, 1), 255)
    tiny.save(root / "small" / "metal_nut" / "1_1_mask.png")
    assert dataset[5]["emptied"] is True


def saved(image: Image.Image, path: Path, **options) -> np.ndarray:
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_every_kind_of_image_is_read_as_a_viewer_shows_it(tmp_path):
    ramp = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    grey = np.repeat(ramp[..., None], 3, axis=-1)
    assert np.array_equal(saved(Image.fromarray(ramp), tmp_path / "grey.png"), grey)
    assert np.array_equal(saved(Image.fromarray(ramp.astype(np.uint16) * 257), tmp_path / "deep.png"), grey)
    assert np.array_equal(saved(Image.fromarray(ramp.astype(np.uint16) * 257), tmp_path / "deep.tif"), grey)
    assert np.array_equal(saved(Image.fromarray(ramp), tmp_path / "an image.jpg.bmp"), grey)
    palette = Image.fromarray(grey).convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
    assert np.array_equal(saved(palette, tmp_path / "palette.png"), grey)
    clear = np.dstack([grey, np.full((4, 6), 255, dtype=np.uint8)])
    clear[0, 0] = (9, 9, 9, 0)
    seen = saved(Image.fromarray(clear), tmp_path / "transparent.png")
    assert seen[0, 0].tolist() == [255, 255, 255] and np.array_equal(seen[1:], grey[1:])
    assert np.array_equal(saved(Image.fromarray(ramp), tmp_path / "jpeg.png", format="JPEG").shape, (4, 6, 3))
    for pixels in (ramp.astype(np.float32), ramp.astype(np.int32) * 70000):
        Image.fromarray(pixels).save(tmp_path / "odd.tif")
        with pytest.raises(ValueError, match=r"odd.tif: not readable as an image .*expected .*8 or 16 bits"):
            read_image(tmp_path / "odd.tif")


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize(
    ("suffix", "orientation"),
    [(suffix, turn) for suffix in ("png", "webp", "jpg", "tif") for turn in range(1, 5 if suffix == "tif" else 9)],
)
def test_exif_orientation_turns_images_and_their_size(tmp_path, suffix, orientation):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    path = tmp_path / f"photo.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    found = saved(image, path, exif=turned_by(orientation), **lossless)
    turns = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
             7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
    turn = turns[orientation]
    expected = image.transpose(Image.Transpose[turn]) if turn else image
    assert np.allclose(found[..., 0], np.asarray(expected), atol=2 if suffix == "jpg" else 0)
    assert size_on_disk(path) == expected.size
    # Turned once, whoever hands it on: from an open file, and where it was turned before.
    with Image.open(path) as opened:
        assert np.array_equal(as_rgb(opened), found)
    assert np.array_equal(as_rgb(read_image(path)), found)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "P", "LA"])
def test_an_orientation_in_xmp_turns_an_image_once_or_not_at_all(tmp_path, suffix, mode):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).convert(mode)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    if suffix == "png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        image.save(tmp_path / "x.png", pnginfo=text)
    else:
        (image if suffix == "webp" else image.convert("RGB")).save(tmp_path / f"x.{suffix}", xmp=xmp)
    found = read_image(tmp_path / f"x.{suffix}")
    assert found.size == size_on_disk(tmp_path / f"x.{suffix}") == ((6, 4) if suffix == "png" else (4, 6))
    assert np.array_equal(as_rgb(found), found)


def test_a_tiff_file_by_a_quarter_turn_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(tmp_path / "scan.tif", exif=turned_by(6))
    for read in (read_image, size_on_disk):
        with pytest.raises(ValueError, match=r"scan.tif: not readable .*save it upright"):
            read(tmp_path / "scan.tif")


def test_exif_data_that_cannot_be_written_again_is_no_obstacle(tmp_path):
    exif = turned_by(6).tobytes()
    # A second tag: the resolution as a text, which Pillow reads, but refuses to write.
    exif = exif[:14] + b"\x00\x02" + exif[16:28] + b"\x01\x1a\x00\x02\x00\x00\x00\x02a\x00\x00\x00" + exif[28:]
    image = Image.fromarray(np.zeros((4, 6), dtype=np.uint8))
    assert saved(image, tmp_path / "photo.jpg", exif=exif).shape == (6, 4, 3)


def test_a_mask_across_its_image_is_refused(root):
    data = open_dataset("small", root)
    record = data.records[4]
    with Image.open(data.folder / record.image_path) as image:
        image.save(data.folder / record.image_path, exif=turned_by(6))
    with pytest.raises(ValueError, match=r"1_0_mask.png: is 48 x 40 px, and its image, .* 40 x 48"):
        survey(data.folder, data.records)
    with pytest.raises(ValueError, match="Turn one of them"):
        read_record(data.folder, record)


def test_every_kind_of_mask_is_read(tmp_path):
    truth = np.zeros((4, 6), dtype=bool)
    truth[1:3, 2:5] = True
    palette = Image.fromarray(truth.astype(np.uint8))
    palette.putpalette([0, 0, 0, 0, 0, 1] + [0] * 762)
    blue = np.zeros((4, 6, 3), dtype=np.uint8)
    blue[truth] = (0, 0, 1)
    clear = np.full((4, 6, 4), 200, dtype=np.uint8)
    clear[..., 3] = truth * 255
    kinds = {
        "one": Image.fromarray(truth),
        "dark": Image.fromarray(truth.astype(np.uint8)),
        "deep": Image.fromarray(truth.astype(np.uint16)),
        "palette": palette,
        "blue": Image.fromarray(blue),
        "clear": Image.fromarray(clear),
    }
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask_pixels(tmp_path / f"{name}.png").defect, truth), name


def blob() -> np.ndarray:
    """A disc with a scratch, as the true defect of a photograph."""
    y, x = np.mgrid[:96, :128]
    truth = (y - 40) ** 2 + (x - 30) ** 2 < 15**2
    truth[70:73, 50:110] = True
    return truth


def labels_of(values: list[int]) -> Image.Image:
    """A map of several labels, each in a band of the defect."""
    bands = np.array(values, dtype=np.uint8)[np.arange(128) * len(values) // 128]
    return Image.fromarray(np.where(blob(), bands, 0).astype(np.uint8))


WHITE = Image.fromarray(blob().astype(np.uint8) * 255)


@pytest.mark.parametrize(
    ("mask", "kind", "options", "cut"),
    [
        (WHITE, "png", {}, False),
        (Image.fromarray(blob().astype(np.uint8) * 128), "png", {}, False),
        (Image.fromarray(blob().astype(np.uint8)), "png", {}, False),
        (WHITE.convert("1"), "png", {}, False),
        (WHITE.convert("P"), "png", {}, False),
        (labels_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), "png", {}, False),
        (labels_of([*range(1, 21), 255]), "png", {}, False),
        (labels_of([40, 80, 120, 160, 200, 240]), "png", {}, False),
        (labels_of(list(range(1, 121))), "png", {}, False),
        (WHITE, "jpg", {"quality": 75}, True),
        (WHITE, "jpg", {"quality": 30}, True),
        (WHITE.convert("RGB"), "jpg", {"quality": 90}, True),
        (Image.fromarray(blob().astype(np.uint8) * 128), "jpg", {"quality": 75}, True),
        (WHITE, "webp", {"quality": 50}, True),
    ],
)
def test_masks_of_labels_stay_and_lossy_ones_are_cut(tmp_path, mask, kind, options, cut):
    path = tmp_path / f"mask.{kind}"
    mask.save(path, **options)
    found = read_mask_pixels(path)
    assert found.cut is cut
    assert np.array_equal(found.defect, blob()) if not cut else (found.defect != blob()).mean() < 0.002


def test_resized_masks_and_tiny_lossy_ones_are_cut(tmp_path):
    WHITE.resize((64, 48), Image.Resampling.BILINEAR).save(tmp_path / "small.png")
    found = read_mask_pixels(tmp_path / "small.png")
    assert found.cut and abs(found.defect.mean() / blob().mean() - 1) < 0.1
    tiny = np.zeros((96, 128), dtype=np.uint8)
    tiny[40:42, 40:42] = 255
    Image.fromarray(tiny).save(tmp_path / "tiny.jpg", quality=75)
    found = read_mask_pixels(tmp_path / "tiny.jpg")
    assert found.cut and found.defect.sum() < 10


def test_lossy_masks_are_said_once_and_give_the_metrics_of_true_ones(scripts, root, base, capsys, monkeypatch):
    folder, lines = root / "small", []
    test = ["test", "--ckpt", base, "--dataset", "small", "--device", "cpu", "--resamples", "5"]
    assert scripts(*test, data_root=root) == 0
    exact = (base / "base_small.csv").read_text(encoding="utf-8")
    assert "masks are grey" not in capsys.readouterr().err
    for line in (folder / "full-shot.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "mask_path" in entry:
            path = folder / entry["mask_path"]
            Image.open(path).convert("L").save(path.with_suffix(".jpg"), quality=75)
            entry["mask_path"] = entry["mask_path"].replace(".png", ".jpg")
        lines.append(json.dumps(entry))
    (folder / "full-shot.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert scripts(*test, data_root=root) == 0
    assert capsys.readouterr().err.count("8 of 8 masks are grey around their edges") == 1
    assert (base / "base_small.csv").read_text(encoding="utf-8") == exact
    monkeypatch.setattr(sys, "argv", ["check", "small", "--data_root", str(root)])
    assert check.main() == 1
    said = capsys.readouterr().out
    assert "doubtful masks: small, 8 of 8 masks are grey" in said and "all well" not in said


def test_truncated_and_empty_files_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    for broken in (content[: len(content) // 2], b"", b"plain text"):
        (tmp_path / "a.jpg").write_bytes(broken)
        with pytest.raises(ValueError, match=r"a.jpg: not readable as an image"):
            read_image(tmp_path / "a.jpg")


def test_smooth_augmentation_brings_in_the_reflected_image_with_its_mask():
    # What moves in is black or white too, never a fill.
    image, mask, plain = image_that_is_its_mask(0, 20)
    white, black = plain.amax(dim=(1, 2)), plain.amin(dim=(1, 2))
    grown = moved = 0
    for seed in range(40):
        pixels, target = augmented(image, mask, seed, "smooth")
        brightness = ((pixels - black.view(3, 1, 1)) / (white - black).view(3, 1, 1)).mean(dim=0)
        assert target.unique().tolist() == [0, 1] and brightness.min() > -1e-3 and brightness.max() < 1 + 1e-3
        # Bilinear edges are between black and white; the mask runs within a pixel of their middle.
        assert ((brightness > 0.5) != (target[0] > 0)).float().mean() < 0.03
        moved += not torch.equal(pixels, plain)
        grown += int(
            target.sum() > 1.1 * np.count_nonzero(mask)
        )  # of a defect at the border, the mirror image moves in
    assert 30 <= moved <= 40 and grown > 3


def test_smooth_jitter_acts_on_the_resized_image():
    image = Image.fromarray(np.random.default_rng(0).integers(60, 190, (100, 80, 3), dtype=np.uint8))
    transform = Transform(32, "image", "smooth")
    sizes = []
    transform.jitter = v2.Lambda(lambda picture: sizes.append(picture.size) or picture)
    transform(image, None)
    assert sizes == [(32, 32)]


@pytest.mark.parametrize("augment", ["published", "smooth"])
@pytest.mark.parametrize("stage", ["text", "image"])
def test_the_cache_gives_the_same_tensors(root, augment, stage):
    data = open_dataset("small", root)
    transform = Transform(32, stage, augment)
    cache = cache_images(data.folder, data.records, transform)
    side = 32 * 32 if augment == "smooth" else 48 * 40
    assert cache.size == 16 * side * 3 + 8 * side
    for index in range(0, 16, 3):
        plain = AnomalyDataset(data.folder, data.records, transform)[index, 7]
        cached = AnomalyDataset(data.folder, data.records, transform, cache)[index, 7]
        assert torch.equal(plain["image"], cached["image"]) and torch.equal(plain["mask"], cached["mask"])


@pytest.mark.parametrize("stage", [None, "text", "image"])
def test_items_leave_the_global_generator_alone(root, stage):
    data = open_dataset("small", root)
    dataset = AnomalyDataset(data.folder, data.records, Transform(32, stage))
    before = torch.random.get_rng_state()
    assert torch.equal(dataset[4, 7]["image"], dataset[4, 7]["image"])
    if stage is None:
        assert torch.equal(dataset[4]["image"], dataset[4, 7]["image"])
    else:
        with pytest.raises(ValueError, match=r"expected \(index, seed\), found an index"):
            dataset[4]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_cache_that_does_not_fit_is_left_out(root, monkeypatch, caplog):
    data = open_dataset("small", root)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    assert cache_images(data.folder, data.records, Transform(32)) is None
    assert "0.00 GB of decoded images" in caplog.text and "every epoch reads the files" in caplog.text


@pytest.fixture
def spawn():
    """Workers start as on Windows and macOS: what they need is pickled."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_workers_that_are_spawned_give_the_same(root, spawn):
    data = open_dataset("small", root)
    transform = Transform(32, "image")
    cache = ImageCache(data.folder, data.records, transform)
    cache.fill()

    def epoch(workers: int, cache: ImageCache | None) -> torch.Tensor:
        dataset = AnomalyDataset(data.folder, data.records, transform, cache)
        loader = make_loader(dataset, 5, workers, SeededSampler(len(dataset), (1, 2)))
        return torch.cat([batch["image"] for batch in loader])

    assert torch.equal(epoch(1, cache), epoch(0, None))


def photograph(width: int, height: int, kind: str) -> Image.Image:
    """Pixels as smooth and as noisy as those of a photograph, lines of all colours, or nothing but noise."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    coarse = Image.fromarray(rng.integers(40, 216, (height // 16, width // 16, 3), dtype=np.uint8))
    found = coarse.resize((width, height), Image.Resampling.BILINEAR)
    if kind == "lines":
        for _ in range(200):
            ends = [tuple(rng.integers(0, (width, height)).tolist()) for _ in range(2)]
            colour = tuple(rng.integers(0, 256, 3).tolist())
            ImageDraw.Draw(found).line(ends, colour, int(rng.integers(1, 12)))
    return Image.fromarray(np.clip(found + rng.normal(0, 2, (height, width, 3)), 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("size", "side", "scale"), [(2072, 518, 2), (1024, 64, 8), (256, 64, 2)])
@pytest.mark.parametrize(("kind", "most", "mean"), [("photograph", 8, 2), ("lines", 40, 4), ("noise", 40, 4)])
def test_a_reduced_jpeg_gives_nearly_the_same_tensor(tmp_path, size, side, scale, kind, most, mean):
    """The bounds that docs/data.md states, in levels of 255."""
    photograph(size, size, kind).save(tmp_path / "x.jpg", quality=75)
    whole, reduced = (read_image(tmp_path / "x.jpg", 16, to) for to in (None, reduced_for(side)))
    assert whole.size == (size, size) and reduced.size == (size // scale, size // scale)
    first, second = (Transform(side)(image, None)[0] for image in (whole, reduced))
    levels = ((first - second) * STD * 255).abs()
    assert levels.max() <= most and levels.mean() <= mean


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 256), (256, 128)),
        ((255, 255), (255, 255)),
        ((514, 257), (514, 257)),
        ((516, 1040), (129, 260)),
        ((518, 1040), (259, 520)),
    ],
)
def test_a_jpeg_is_reduced_where_both_sides_stay_large_and_whole(tmp_path, size, expected):
    image = photograph(*size, "photograph")
    image.save(tmp_path / "x.jpg", exif=turned_by(6))
    found = read_image(tmp_path / "x.jpg", 16, reduced_for(64))
    assert found.size == expected[::-1] == size_on_disk(tmp_path / "x.jpg", reduced_for(64))
    image.save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png", 16, reduced_for(64)), image)


@pytest.mark.parametrize("augment", ["published", "smooth"])
def test_masks_are_never_read_reduced(root, augment):
    folder, record = root / "small", Record("x.jpg", 1, "candle", "x_mask.jpg")
    photograph(512, 512, "photograph").save(folder / "x.jpg")
    mask = Image.new("L", (512, 512))
    mask.paste(255, (100, 200, 201, 303))
    mask.save(folder / "x_mask.jpg")
    (reduced,) = with_reduced_jpeg([record], 64)
    assert [image.size for image in read_record(folder, reduced)] == [(128, 128), (512, 512)]
    for stage in ("text", "image"):
        transform = Transform(64, stage, augment)
        cache = ImageCache(folder, [reduced], transform)
        cache.fill()
        whole = AnomalyDataset(folder, [record], transform)[0, 7]
        for kept in (None, cache):
            found = AnomalyDataset(folder, [reduced], transform, kept)[0, 7]
            assert torch.equal(found["mask"], whole["mask"]) and (found["image"] - whole["image"]).abs().max() < 0.3


def test_reduced_jpegs_are_recorded(scripts, root, base, tmp_path, capsys):
    folder = root / "small"
    for path in (folder / "candle").glob("?_?.png"):
        Image.open(path).resize((384, 320)).save(path, format="JPEG")
    command = ["train_cross_attention", "--dataset", "small", "--device", "cpu", "--text_epoch", "1", "--loops", "1"]
    command += ["--image_epoch", "1", "--resume", base, "--save_path", tmp_path / "run", "--reduced_jpeg"]
    assert scripts(*command, data_root=root) == 0
    assert load_checkpoint(tmp_path / "run" / "loop_1.pth").training["reduced_jpeg"] is True
    test = ["test", "--ckpt", tmp_path / "run" / "loop_1.pth", "--dataset", "small", "--device", "cpu"]
    scores = []
    for flags, said in (([], 0), (["--reduced_jpeg"], 1)):
        capsys.readouterr()
        assert scripts(*test, *flags, data_root=root) == 0
        assert capsys.readouterr().out.count("decoded at reduced size (--reduced_jpeg)") == said
        rows = read_csv(tmp_path / "run" / "loop_1_small.csv", ["reduced_jpeg", "pixel_auroc"])
        assert {row["reduced_jpeg"] for row in rows} == {str(bool(flags))}
        images = read_csv(tmp_path / "run" / "loop_1_small_images.csv", ["class", "single_score"])
        scores.append({row["class"]: float(row["single_score"]) for row in images})
    assert scores[0]["metal_nut"] == scores[1]["metal_nut"]
    assert 0 < abs(scores[0]["candle"] - scores[1]["candle"]) < 0.02
    predict = ["predict", "--ckpt", tmp_path / "run" / "loop_1.pth", "--images", folder / "candle" / "1_3.png"]
    assert scripts(*predict, "--class_name", "candle", "--reduced_jpeg", "--save_path", tmp_path / "predictions") == 0
    (row,) = read_csv(tmp_path / "predictions" / "predictions.csv", ["single_score"])
    assert float(row["single_score"]) == pytest.approx(scores[1]["candle"], abs=1e-5)
