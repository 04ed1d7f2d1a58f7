"""Records, draws, images, masks and augmentation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from dataset.constants import DATA_SETS, class_prompts, describe_class
from dataset.images import AnomalyDataset, Transform, check_files, loader_message, make_loader, read_mask
from dataset.records import Record, few_shot, hold_out, read_records, write_records
from dataset.sets import open_dataset
from tests.conftest import write_small_dataset

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def test_prompts_are_the_published_ones():
    prompts = class_prompts("candle")
    assert len(prompts) == 16
    assert prompts[:6] == ["candle.", "a photo of candle.", "a candle.", "a photo of a candle.", "the candle.",
                           "a photo of the candle."]  # fmt: skip
    assert prompts[6:8] == ["a damaged candle.", "a photo of a damaged candle."]
    assert prompts[-1] == "a photo of a candle with damage."
    assert describe_class("MVTec", "grid") == ("metal or plastic mesh", True)
    assert describe_class("mine", "blue_cup") == ("blue cup", False)
    assert describe_class("mine", "object") == ("object", True)
    assert {name: len(info.classes) for name, info in DATA_SETS.items()}["VisA"] == 12


@pytest.fixture
def root(tmp_path) -> Path:
    write_small_dataset(tmp_path / "small", per_kind=4)
    return tmp_path


def edit(root: Path, change) -> None:
    path = root / "small" / "full-shot.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    change(lines)
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


def test_records_and_descriptions(root):
    data = open_dataset("small", root)
    assert len(data.records) == 16 and data.domain == "industrial"
    assert data.descriptions == {"metal_nut": "metal nut", "candle": "candle"}
    assert data.of_class("candle")[0] == Record("candle/0_0.png", 0, "candle")
    assert data.of_class("candle")[-1].mask_path == "candle/1_3_mask.png"
    assert open_dataset("small", root, "medical").domain == "medical"


def test_byte_order_mark_blank_lines_and_float_labels(root):
    path = root / "small" / "full-shot.jsonl"
    lines = path.read_text(encoding="utf-8").replace('"label": 1', '"label": 1.0').splitlines()
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    records = read_records(path, root / "small")
    assert len(records) == 16
    assert {type(record.label) for record in records} == {int}


def test_known_data_sets_accept_published_folders_and_their_own_name(tmp_path):
    for folder in ("VisA_20220922", "BTAD"):
        write_small_dataset(tmp_path / folder, classes=("candle", "pcb1"))
    visa = open_dataset("VisA", tmp_path)
    assert visa.folder == tmp_path / "VisA_20220922"
    assert visa.descriptions["pcb1"] == "dual ultrasonic distance sensor pcb module"
    assert open_dataset("BTAD", tmp_path).folder == tmp_path / "BTAD"
    with pytest.raises(ValueError, match="VisA is industrial"):
        open_dataset("VisA", tmp_path, "medical")


def test_missing_root_shows_the_expected_tree(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open_dataset("VisA", tmp_path / "nowhere")
    assert "does not exist" in str(error.value) and "VisA_20220922/full-shot.jsonl" in str(error.value)
    (tmp_path / "VisA").mkdir()
    with pytest.raises(FileNotFoundError, match="but no metadata"):
        open_dataset("VisA", tmp_path)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda s: s[2].pop("label"), ValueError, "line 3: .*label is missing"),
        (lambda s: s[2].update(label=2), ValueError, "line 3: label is 2"),
        (lambda s: s[0].update(image_path="gone.png"), FileNotFoundError, "line 1: the image .*gone.png"),
        (lambda s: s[5].update(mask_path="gone.png"), FileNotFoundError, "line 6: the mask .*gone.png"),
        (lambda s: s[0].update(image_path="../x.png"), ValueError, "line 1: .*outside"),
        (lambda s: s[0].update(image_path="/etc/passwd"), ValueError, "line 1: .*outside"),
        (lambda s: s.clear(), ValueError, "no records"),
    ],
)
def test_bad_lines_are_named(root, change, kind, message):
    edit(root, change)
    with pytest.raises(kind, match=message):
        open_dataset("small", root)


def test_broken_json_is_named(root):
    path = root / "small" / "full-shot.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '\n{"image_path": ', encoding="utf-8")
    with pytest.raises(ValueError, match="line 17: not JSON"):
        open_dataset("small", root)


def test_few_shot_draws_half_of_each_kind(root):
    records = open_dataset("small", root).records
    chosen = few_shot(records, 4, seed=1)
    for class_name in ("metal_nut", "candle"):
        labels = [record.label for record in chosen if record.class_name == class_name]
        assert sorted(labels) == [0, 0, 1, 1]
    assert chosen == few_shot(records, 4, seed=1)
    assert any(chosen != few_shot(records, 4, seed=seed) for seed in range(2, 6))
    for shot, kept, message in [(12, records, "needed 6"), (2, records[:4], "0 anomalous")]:
        with pytest.raises(ValueError, match=message):
            few_shot(kept, shot, seed=1)


def test_hold_out_takes_a_share_of_each_class_and_kind(root):
    records = open_dataset("small", root).records
    train, held_out = hold_out(records, 0.25, seed=1)
    assert len(train) == 12 and len(held_out) == 4
    assert {(r.class_name, r.label) for r in held_out} == {(c, k) for c in ("metal_nut", "candle") for k in (0, 1)}
    assert sorted(train + held_out, key=str) == sorted(records, key=str)
    assert hold_out(records, 0, seed=1) == (records, [])


def test_records_round_trip(root, tmp_path):
    records = open_dataset("small", root).records
    write_records(tmp_path / "list.jsonl", records)
    assert read_records(tmp_path / "list.jsonl", root / "small") == records


def test_empty_masks_and_unreadable_files(root):
    folder = root / "small"
    Image.new("L", (48, 40)).save(folder / "candle" / "1_0_mask.png")
    with pytest.raises(ValueError, match=r"1_0_mask.png: the mask of an anomalous image is empty"):
        check_files(folder, open_dataset("small", root).records)
    (folder / "candle" / "1_1_mask.png").write_bytes(b"")
    with pytest.raises(ValueError, match="not readable as a mask"):
        read_mask(folder / "candle" / "1_1_mask.png")
    (folder / "metal_nut" / "0_0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"0_0.png: not readable as an image"):
        check_files(folder, open_dataset("small", root).records)
    dataset = AnomalyDataset(folder, open_dataset("small", root).records, 32)
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


def augmented(stage: str, seed: int, image: Image.Image, mask: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return Transform(64, stage)(image, mask)


def test_augmentation_moves_image_and_mask_together_and_fills_with_zero():
    # The image is its own mask, in white on black, so the two can be compared after any movement.
    array = np.zeros((64, 64), dtype=np.uint8)
    array[8:30, 20:50] = 255
    mask = Image.fromarray(array)
    image = Image.merge("RGB", [mask] * 3)
    plain, _ = Transform(64)(image, mask)
    white, black = plain.amax(dim=(1, 2)), plain.amin(dim=(1, 2))
    moved = filled = 0
    for seed in range(40):
        pixels, target = augmented("text", seed, image, mask)
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
    dataset = AnomalyDataset(root / "small", open_dataset("small", root).records, 32)
    normal, maskless, masked = dataset[0], dataset[4], dataset[5]
    assert (normal["label"], normal["has_mask"], normal["emptied"]) == (0, True, False)
    assert (maskless["label"], maskless["has_mask"]) == (1, False)
    assert (masked["has_mask"], masked["emptied"]) == (True, False) and masked["mask"].sum() > 0
    tiny = Image.new("L", (480, 400))
    tiny.putpixel((1, 1), 255)
    tiny.save(root / "small" / "metal_nut" / "1_1_mask.png")
    assert dataset[5]["emptied"] is True
