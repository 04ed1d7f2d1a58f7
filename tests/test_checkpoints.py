"""Checkpoint files: AA-CLIP's base, loop files, and what is said of wrong ones."""

import csv
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import EPOCHS, assert_same_tensors, make_model, tensors
from utils import checkpoints
from utils.checkpoints import load_checkpoint
from utils.models import resolve_config

EXTEND = ["--dataset", "small", "--device", "cpu", *EPOCHS, "--loops", "2"]
BOTH = {"text_cross_attn": True, "image_cross_attn": True}


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def rewrite(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_base_files_are_aa_clips_with_a_config(base):
    text, image = (torch.load(base / name, weights_only=True) for name in ("text_adapter.pth", "image_adapter.pth"))
    assert {"epoch", "text_adapter", "text_optimizer", "config"} <= text.keys()
    assert {"epoch", "image_adapter", "image_optimizer", "config"} <= image.keys()
    assert list(text["text_adapter"]) == ["0.fc.0.weight", "1.fc.0.weight", "2.fc.0.weight", "3.fc.0.weight"]
    assert "layer_adapters.2.fc.0.weight" in image["image_adapter"] and "det_proj.fc.weight" in image["image_adapter"]
    assert text["config"]["model"]["model_name"] == "demo" and text["config"]["training"]["dataset"] == "small"


def test_loop_files_hold_all_that_they_should(run, base):
    for loop in (0, 1, 2):
        content = torch.load(run / f"loop_{loop}.pth", weights_only=True)
        assert content["loop"] == loop
        for name in ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn"):
            assert all(isinstance(value, torch.Tensor) for value in content[name].values())
        assert content["config"]["model"]["text_cross_attn"] is True
        assert content["base"]["path"] == base.as_posix() and len(content["base"]["sha256"]) == 2
        assert content["environment"]["clip_sha256"]
    assert content["metrics"]["image"]["loss"] > 0
    zero = tensors(run / "loop_0.pth")
    for name in ("text_cross_attn", "image_cross_attn"):
        assert not zero[f"{name}.gate"].any() and (tensors(run / "loop_1.pth")[f"{name}.gate"] > 0).all()
    for key, value in tensors(base).items():
        assert torch.equal(zero[key], value)


def test_another_image_is_the_same_in_every_batch(scripts, base, data_root, tmp_path, capsys):
    flags = ["--dataset", "small", "--device", "cpu", *EPOCHS, "--image_context", "another", "--val_fraction", "0.4"]
    path = tmp_path / "x" / "loop_1.pth"
    assert scripts("train_cross_attention", *flags, "--resume", base, "--loops", "1", "--save_path", path.parent) == 0
    test, scores = ["test", "--ckpt", path, "--dataset", "small", "--device", "cpu"], []
    for size in ("1", "7"):
        assert scripts(*test, "--resamples", "5", "--batch_size", size) == 0
        with open(path.with_name("loop_1_small_images.csv"), newline="", encoding="utf-8") as file:
            scores.append([float(row["single_score"]) for row in csv.DictReader(file)])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scripts(*test, "--class_name", "candle", "--image_idx", "3") == 0
    images = data_root / "small" / "candle"
    assert scripts("predict", "--ckpt", path, "--images", images, "--save_path", tmp_path / "out") == 2
    assert "a control, which looks at another image of a data set" in capsys.readouterr().err


@pytest.mark.usefixtures("no_estimates")
def test_a_learning_rate_of_what_does_not_learn_is_refused(scripts, base, tmp_path, capsys):
    command = ["train_cross_attention", "--dataset", "small", "--resume", base, "--save_path", tmp_path / "x"]
    assert scripts(*command, "--image_cross_attn_lr", "1e-3", "--dry_run") == 2
    assert "--image_cross_attn_lr: cross-attention in the joint space has no weights" in capsys.readouterr().err
    assert scripts(*command, "--image_cross_attn_lr", "1e-3", "--cross_attn", "block", "--dry_run") == 0


def test_loop_files_that_name_no_placement_are_of_block(scripts, base, tmp_path):
    flags = ["--dataset", "small", "--device", "cpu", *EPOCHS, "--cross_attn", "block", "--text_cross_attn_lr", "1e-3"]
    run = tmp_path / "x"
    assert scripts("train_cross_attention", *flags, "--resume", base, "--loops", "1", "--save_path", run) == 0
    tables = []
    for forget in (False, True):
        path = run / "loop_1.pth"
        content = torch.load(path, weights_only=True)
        assert (
            content["text_cross_attn"]["out_proj.weight"].any() and content["image_cross_attn"]["out_proj.weight"].any()
        )
        if forget:
            assert content["config"]["model"].pop("cross_attn") == "block"
            torch.save(content, path)
        assert resolve_config({}, load_checkpoint(path)).cross_attn == "block"
        assert scripts("test", "--ckpt", path, "--dataset", "small", "--device", "cpu", "--resamples", "10") == 0
        tables.append((run / "loop_1_small_images.csv").read_text(encoding="utf-8"))
    assert tables[0] == tables[1]


def test_aa_clips_own_files_are_assumed_to_be_vit_l(tmp_path, caplog):
    """Files that name no backbone, image_adapter_<epoch>.pth the highest of several."""
    text = {f"{k}.fc.0.weight": torch.zeros(768, 768) for k in range(4)}
    image = {f"layer_adapters.{k}.fc.0.weight": torch.zeros(1024, 1024) for k in range(6)}
    image |= {f"seg_proj.{k}.fc.0.weight": torch.zeros(768, 1024) for k in range(4)}
    image |= {"det_proj.fc.0.weight": torch.zeros(768, 1024)}
    torch.save({"epoch": 5, "text_adapter": text, "text_optimizer": {}}, tmp_path / "text_adapter.pth")
    for epoch in (2, 15, 9):
        content = {"epoch": epoch, "image_adapter": image, "image_optimizer": {}}
        torch.save(content, tmp_path / f"image_adapter_{epoch}.pth")
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.base["epochs"] == {"text": 5, "image": 15}
    caplog.set_level(logging.INFO)
    config = resolve_config({}, checkpoint, BOTH)
    assert (config.model_name, config.img_size, config.relu) == ("ViT-L-14-336", 518, True)
    assert (config.text_adapt_until, config.image_adapt_until, config.adapter_hidden) == (3, 6, None)
    assert config.text_cross_attn and "--img_size 518" in caplog.text
    assert resolve_config({"img_size": 224}, checkpoint, BOTH).img_size == 224
    with pytest.raises(ValueError, match=r"--image_adapt_until 5: contradicts .*, which has 6"):
        resolve_config({"image_adapt_until": 5}, checkpoint, BOTH)


def test_a_bottleneck_is_read_from_the_keys(tmp_path, backbone):
    model = make_model(backbone, adapter_hidden=16)
    saved = checkpoints.states(model)
    for name, extra in (("text_adapter", "text_optimizer"), ("image_adapter", "image_optimizer")):
        torch.save({"epoch": 1, name: saved[name], extra: {}}, tmp_path / f"{name}.pth")
    assert resolve_config({"model_name": "demo"}, load_checkpoint(tmp_path)).adapter_hidden == 16
    rewrite(tmp_path / "text_adapter.pth", lambda c: c["text_adapter"].update({"0.norm.weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"'0\.norm\.weight', an adapter of an unknown kind"):
        resolve_config({"model_name": "demo"}, load_checkpoint(tmp_path))


def wrong_shape(content: dict) -> None:
    content["image_adapter"]["det_proj.fc.weight"] = torch.zeros(5, 7)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such checkpoint"),
        (lambda f: (f / "image_adapter.pth").unlink(), "no image_adapter.pth. A base model is a folder with"),
        (lambda f: (f / "text_adapter.pth").write_bytes(b"hello"), "not readable as a checkpoint"),
        (lambda f: (f / "text_adapter.pth").write_bytes((f / "text_adapter.pth").read_bytes()[:999]), "truncated"),
        (lambda f: rewrite(f / "text_adapter.pth", lambda c: c.update(epoch=0)), "never trained"),
        (lambda f: rewrite(f / "text_adapter.pth", lambda c: c.pop("epoch")), "'epoch' is missing"),
        (
            lambda f: rewrite(f / "text_adapter.pth", lambda c: c["config"]["training"].update(seed=1)),
            "two different runs",
        ),
        (lambda f: torch.save([1, 2], f / "text_adapter.pth"), "expected a dict"),
        (
            lambda f: rewrite(f / "image_adapter.pth", wrong_shape),
            r"det_proj.fc.weight' of another size: shape \[5, 7\], expected \[96, 128\]",
        ),
        (
            lambda f: rewrite(f / "image_adapter.pth", lambda c: c["image_adapter"].pop("det_proj.fc.weight")),
            "lacks 'det_proj.fc.weight'",
        ),
        (
            lambda f: rewrite(f / "text_adapter.pth", lambda c: c["environment"].update(clip_sha256="0" * 64)),
            "trained on other CLIP weights",
        ),
    ],
)
def test_a_bad_base_ends_with_2_and_writes_nothing(scripts, copy, tmp_path, capsys, damage, message):
    damage(copy)
    out = tmp_path / "out"
    assert scripts("train_cross_attention", *EXTEND, "--resume", copy, "--save_path", out) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_what_data_parallel_saves_is_read(base, copy):
    for name in ("text_adapter", "image_adapter"):
        rewrite(
            copy / f"{name}.pth", lambda c, name=name: c.update({name: {f"module.{k}": v for k, v in c[name].items()}})
        )
    assert_same_tensors(copy, base)


def test_half_a_base_and_files_of_other_attempts(run, base, tmp_path):
    with pytest.raises(ValueError, match="one half of a base model"):
        load_checkpoint(base / "text_adapter.pth")
    old = torch.load(run / "loop_1.pth", weights_only=True)
    torch.save({name: old[name] for name in checkpoints.MODULES}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match="other attempts"):
        load_checkpoint(tmp_path / "old.pth")
    torch.save({"weights": torch.ones(1)}, tmp_path / "any.pth")
    with pytest.raises(ValueError, match="'text_adapter' is missing"):
        load_checkpoint(tmp_path / "any.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text_lr", "1e-3"], "text_lr: 1e-05 before, 0.001 now"),
        (["--feedback", "off", "--seed", "4"], "feedback: adapted before, off now"),
        (["--no_text_cross_attn"], "text_cross_attn: True before, False now"),
    ],
)
def test_a_run_of_other_arguments_is_refused(scripts, run, base, capsys, arguments, message):
    assert scripts("train_cross_attention", *EXTEND, *arguments, "--resume", base, "--save_path", run) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_another_base_is_refused(scripts, run, copy, capsys):
    rewrite(copy / "text_adapter.pth", lambda c: c.update(epoch=7))
    assert scripts("train_cross_attention", *EXTEND, "--resume", copy, "--save_path", run) == 2
    assert "started from another base" in capsys.readouterr().err


def test_a_folder_that_is_no_run_and_the_resumed_folder_are_refused(scripts, base, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert scripts("train_cross_attention", *EXTEND, "--resume", base, "--save_path", tmp_path) == 2
    assert "has no state.pth, so no run goes on there" in capsys.readouterr().err
    assert scripts("train_cross_attention", *EXTEND, "--resume", base, "--save_path", base) == 2
    assert "holds the checkpoint of --resume" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"half")])
def test_a_lost_state_says_how_to_go_on(scripts, run, base, tmp_path, capsys, damage):
    folder = Path(shutil.copytree(run, tmp_path / "lost"))
    damage(folder / "state.pth")
    command = ["train_cross_attention", *EXTEND, "--save_path"]
    assert scripts(*command, folder, "--resume", base, "--loops", "3") == 2
    message = capsys.readouterr().err
    assert "Choose another --save_path, or go on from" in message and "loop_2.pth with --resume" in message
    assert scripts(*command, tmp_path / "new", "--resume", folder / "loop_2.pth", "--loops", "3") == 0
    assert (tmp_path / "new" / "loop_3.pth").exists()


def test_saving_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    checkpoints.save({"value": 1}, path)

    def broken(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError):
        checkpoints.save({"value": 2}, path)
    assert checkpoints.read(path) == {"value": 1}
