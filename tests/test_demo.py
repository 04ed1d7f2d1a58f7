"""The rendered products, the data sets made of them, and the pre-training of the demo model."""

import math
import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain_demo
from dataset.constants import DATA_SETS
from dataset.demo import build as building
from dataset.demo.captions import (
    CATEGORIES,
    DAMAGED,
    INTACT,
    NAMED,
    SAYS_DAMAGED,
    SAYS_INTACT,
    SILENT,
    TRAIN,
    UNKNOWN,
    Caption,
    draw_captions,
    truth,
)
from dataset.demo.defects import DEFECT_AREA, DEFECTS, Site
from dataset.demo.products import PRODUCTS
from dataset.demo.render import render
from dataset.prepare import prepare
from dataset.sets import find_dataset, open_dataset
from model.backbone import load_backbone
from model.config import REPOSITORY
from tests.conftest import listing
from utils.checkpoints import load_checkpoint
from utils.cli import run_script


def test_the_three_sets_divide_the_categories():
    sets = [set(DATA_SETS[name].classes) for name in building.DEMO_SETS]
    assert [len(classes) for classes in sets] == [12] * 3
    assert set.union(*sets) == set(PRODUCTS) and len(PRODUCTS) == 36


@pytest.mark.parametrize("category", PRODUCTS)
def test_renders(category):
    intact, damaged = (render(category, flag, (1, 2), 96) for flag in (False, True))
    again = render(category, True, (1, 2), 96)
    assert np.array_equal(damaged.image, again.image) and np.array_equal(damaged.mask, again.mask)
    assert intact.image.shape == (96, 96, 3) and intact.image.dtype == np.uint8 and intact.image.std() > 5
    assert intact.defect is None and not intact.mask.any()
    assert damaged.defect in DEFECTS and set(np.unique(damaged.mask)) == {0, 255}
    low, high = DEFECT_AREA
    assert low <= (damaged.mask > 0).mean() <= high
    assert not np.array_equal(render(category, False, (1, 3), 96).image, intact.image)


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_changes_what_its_mask_says(kind):
    size = 128
    rng, light = np.random.default_rng(3), np.array([0.6, 0.8], dtype=np.float32)
    inside = np.zeros((size, size), dtype=np.float32)
    inside[20:108, 20:108] = 1
    under = np.full((size, size, 3), 20, dtype=np.float32)
    image = np.full((size, size, 3), 120, dtype=np.float32)
    site = Site(rng, size, np.array([64.0, 64.0]), 20.0, inside, light, under)
    taken = DEFECTS[kind](image, site) > 0.35
    changed = np.abs(image - 120).max(axis=2) > 8
    assert taken.any() and (changed & taken).sum() > 0.6 * taken.sum()
    assert (changed & ~taken).sum() < 0.35 * changed.sum()  # soft edges, and a thread's shadow


def test_every_kind_of_defect_is_drawn():
    assert {render("gear", True, (7, seed), 64).defect for seed in range(60)} == set(DEFECTS)


def test_a_demo_set_is_rendered_where_it_is_prepared(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(building, "IMAGES_PER_CLASS", 2)
    root = tmp_path / "new" / "root"
    for use in (open_dataset, find_dataset):
        with pytest.raises(FileNotFoundError) as error:
            use("demo_test", root)
        assert f"Render it: python -m dataset.metadata demo_train demo_dev demo_test --data_root {root} (" in str(
            error.value
        )
    assert not list(tmp_path.iterdir())
    with caplog.at_level("INFO", "dataset"):
        prepare("demo_test", root)
    assert f"Rendering demo_test into {root}." in caplog.text
    data = open_dataset("demo_test", root)
    assert data.folder == root / "demo_test" and len(data.records) == 24
    assert data.descriptions["bottle_top"] == "bottle top" and data.domain == "industrial"
    damaged = [record for record in data.records if record.label]
    assert len(damaged) == 12 and all(record.mask_path for record in damaged)
    image = np.asarray(Image.open(data.folder / damaged[0].image_path))
    rendered = render("nut", True, (building.SET_SEED, list(PRODUCTS).index("nut"), 1))
    assert np.array_equal(image, rendered.image)
    assert np.array_equal(np.asarray(Image.open(data.folder / damaged[0].mask_path)), rendered.mask)

    monkeypatch.setattr(building, "render", None)  # the second time it is there
    before = listing(tmp_path)
    prepare("demo_test", root)
    prepare(str(root / "demo_test"), "nowhere")
    assert open_dataset("demo_test", root).records == data.records and listing(tmp_path) == before

    (root / "demo_test" / building.VERSION_FILE).write_text("0", encoding="utf-8")
    for use in (open_dataset, prepare):
        with pytest.raises(ValueError, match=r"of renderer version 0, expected .* Move it away"):
            use("demo_test", root)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "render", stopped)
    (tmp_path / ".demo_train.half-killed").mkdir()  # as a killed one leaves it
    with pytest.raises(KeyboardInterrupt):
        building.build("demo_train", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".demo_train.lock"]


# pre-training


def test_unseen_categories_are_only_seen_intact():
    damaged = set()
    for number in range(96):
        _, mask, (category, _, condition) = pretrain_demo.render_numbered((number, 0))
        if category in TRAIN:
            assert (condition >= DAMAGED) == mask.any()
            damaged |= {category} if mask.any() else set()
        else:
            assert condition == UNKNOWN and not mask.any()
    assert damaged == set(TRAIN)
    assert {CATEGORIES[number] for number in TRAIN} == set(DATA_SETS["demo_train"].classes)


def test_captions_of_unseen_categories_are_silent_about_the_condition():
    category = torch.arange(36).repeat(8)
    is_seen = torch.tensor([number in TRAIN for number in category.tolist()])
    condition = torch.where(is_seen, torch.arange(288) % 9, UNKNOWN)  # intact and all eight kinds
    colour = torch.arange(288) % 11
    captions = draw_captions(category, colour, condition, np.random.default_rng(0))
    spoken = [caption for caption in captions if caption.says != SILENT]
    assert {caption.says for caption in spoken} >= {SAYS_INTACT, SAYS_DAMAGED, NAMED}
    assert all(caption.category is None or caption.category in TRAIN for caption in spoken)
    assert len({caption.category for caption in captions if caption.says == SILENT}) == 36
    true, known = truth(captions, category, colour, condition)
    speaks = torch.tensor([caption.says != SILENT for caption in captions])
    assert not (true & known)[~is_seen][:, speaks].any()


def test_region_captions_are_of_seen_categories_alone(monkeypatch):
    pool = pretrain_demo.render_pool(48, 0)
    args = Namespace(seed=0, steps=10, batch_size=48)
    given, texts = [], []
    monkeypatch.setattr(pretrain_demo, "region_loss", lambda *found: given.append(found) or torch.zeros(()))
    encode = pretrain_demo.encode_text
    monkeypatch.setattr(pretrain_demo, "encode_text", lambda b, words: texts.extend(words) or encode(b, words))
    pretrain_demo.losses(pretrain_demo.new_backbone(0), pool, args, 0)
    rows = np.random.default_rng((0, 0)).integers(48, size=48)
    seen = sum(pool.category[row].item() in TRAIN for row in rows.tolist())
    (patches, damaged, captions, _) = given[0]
    assert len(patches) == 3 and {len(level) for level in patches} == {seen}
    assert len(damaged) == len(captions) == seen and damaged.any()
    words = ("damaged", "broken", "flaw", "defect", "damage", "intact", "perfect", *DEFECTS)
    for name in DATA_SETS["demo_test"].classes.values():
        about = [text for text in texts if name in text]
        assert about and not [text for text in about if any(word in text for word in words)]


def test_seeds_of_pool_measures_and_sets_are_apart(monkeypatch, tmp_path, capsys):
    """NumPy pads seeds with zeros, so (a, b) is (a, b, 0): they must differ in the first number."""
    assert pretrain_demo.MEASURE_SEED != building.SET_SEED
    for seed in (pretrain_demo.MEASURE_SEED, building.SET_SEED):
        assert pretrain(monkeypatch, "--seed", seed, "--save_path", tmp_path / "x") == 2
        assert "expected less than" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_truth_of_captions():
    captions = [
        Caption(3, None, SILENT),
        Caption(3, 5, SILENT),
        Caption(3, None, SAYS_INTACT),
        Caption(None, None, SAYS_DAMAGED),
        Caption(3, None, NAMED + 2),
    ]
    category, colour = torch.tensor([3, 3, 7]), torch.tensor([5, 1, 5])
    true, known = truth(captions, category, colour, torch.tensor([INTACT, DAMAGED + 2, UNKNOWN]))
    assert true.tolist() == [
        [True, True, True, False, False],
        [True, False, False, True, True],
        [False, False, False, False, False],
    ]
    # Of the third image the condition is unknown; what names another category is false of it anyway.
    assert known.tolist() == [[True] * 5, [True] * 5, [True, True, True, False, True]]


def test_caption_loss_against_a_hand_computed_value():
    images, texts = torch.eye(2), torch.eye(2)[[0, 0, 1]]
    true = torch.tensor([[True, True, False], [False, False, True]])
    known = torch.tensor([[True, True, False], [True, True, True]])
    loss = pretrain_demo.caption_loss(images, texts, torch.tensor(2.0), true, known)
    to_texts = (math.log(2) + math.log(1 + 2 * math.exp(-2))) / 2
    to_images = (2 * math.log(1 + math.exp(-2)) + 0) / 3
    assert loss.item() == pytest.approx((to_texts + to_images) / 2, abs=1e-6)


def test_dropped_patches_keep_their_numbers():
    tokens = torch.arange(5.0).view(1, 5, 1).repeat(2, 1, 3)
    rest, kept = pretrain_demo.drop_patches(tokens, 0.5, torch.Generator().manual_seed(0))
    assert rest.shape == (2, 3, 3) and kept.shape == (2, 2)
    assert torch.equal(rest[:, 1:, 0], kept + 1.0) and not rest[:, 0].any()


def pretrain(monkeypatch, *arguments: object) -> int:
    """Calls pretrain_demo.py in this process; returns its exit code."""
    command = ["pretrain_demo.py", "--images", "48", "--batch_size", "8", "--steps", "3", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(pretrain_demo, "measure", lambda backbone: {})
    with pytest.raises(SystemExit) as exit_info:
        run_script(pretrain_demo.main)
    return exit_info.value.code


def test_pretraining_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert pretrain(monkeypatch, "--save_path", whole) == 0

    def interrupted(*arguments, losses=pretrain_demo.losses):
        signal.raise_signal(signal.SIGTERM)
        return losses(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_demo, "losses", interrupted)
        assert pretrain(monkeypatch, "--save_path", halves) == 1
    assert torch.load(halves / "pretraining_state.pth", weights_only=True)["step"] == 1
    assert pretrain(monkeypatch, "--save_path", halves, "--seed", 1) == 2  # of another run
    assert pretrain(monkeypatch, "--save_path", halves) == 0
    assert sorted(path.name for path in halves.iterdir()) == ["demo.safetensors", "pretraining.log"]
    assert (whole / "demo.safetensors").read_bytes() == (halves / "demo.safetensors").read_bytes()


def test_the_shipped_model_knows_its_products(backbone):
    quality = pretrain_demo.measure(backbone, per_category=20)
    assert quality["accuracy"] > 0.8
    for name in ("dev", "test"):
        assert quality[f"image_auroc_{name}"] > 0.6 and quality[f"patch_auroc_{name}"] > 0.75


def test_regions_weigh_damage_threefold():
    texts, right, wrong = torch.eye(2).unsqueeze(0), math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    intact, damaged = [1.0, 0.0], [0.0, 1.0]
    for looks, labels, expected in [
        ([intact, damaged], [0, 1], right),
        ([intact, intact], [0, 1], (right + 3 * wrong) / 4),
        ([damaged, damaged], [0, 1], (wrong + 3 * right) / 4),
    ]:
        loss = pretrain_demo.region_loss([torch.tensor([looks])], torch.tensor([labels]), texts, torch.tensor(1.0))
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_a_seen_category_has_no_region_loss():
    nothing = [torch.zeros(0, 4, 2)]
    loss = pretrain_demo.region_loss(nothing, torch.zeros(0, 4).long(), torch.zeros(0, 2, 2), torch.tensor(1.0))
    assert loss.item() == 0


# what is shipped


@pytest.mark.usefixtures("no_estimates")
def test_the_shipped_parts_fit_together(backbone, scripts, capsys):
    folder = REPOSITORY / "ckpt" / "demo"
    base = load_checkpoint(folder / "base")
    assert base.clip_sha256 == backbone.sha256 and base.seen() == ["demo_train"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12 * 2**20
    assert scripts("train_cross_attention", f"@{folder / 'feedback.args'}", "--dry_run") == 0
    plan = capsys.readouterr().out
    assert "dataset demo_train" in plan and f"Files in {Path('ckpt', 'demo_feedback')}" in plan


def test_finished_weights_are_only_measured(monkeypatch, tmp_path, capsys):
    assert pretrain(monkeypatch, "--save_path", tmp_path) == 0
    before = (tmp_path / "demo.safetensors").stat().st_mtime_ns
    assert pretrain(monkeypatch, "--save_path", tmp_path) == 0
    assert "only measured" in capsys.readouterr().err
    assert pretrain(monkeypatch, "--save_path", tmp_path, "--lr", "0.1") == 2
    assert "'lr': 0.0015" in capsys.readouterr().err
    assert (tmp_path / "demo.safetensors").stat().st_mtime_ns == before


def test_words_that_no_caption_used_say_nothing(monkeypatch, tmp_path):
    assert pretrain(monkeypatch, "--save_path", tmp_path) == 0
    loaded = load_backbone("demo", clip_weights=tmp_path / "demo.safetensors")
    used, unused = (loaded.tokenize([text])[0, 1] for text in ("nut", "elephant"))
    words = loaded.clip.token_embedding.weight
    assert words[used].any() and not words[unused].any()
