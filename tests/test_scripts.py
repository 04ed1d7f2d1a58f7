"""The commands of the README, on a small data set: exit codes, tables, files and messages."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.loading import AnomalyDataset
from dataset.sets import open_dataset
from dataset.survey import survey
from dataset.transforms import Transform, to_picture
from forward_utils_cross_attention import ClassText, Prediction, PromptBank, check_grid, predict
from model.backbone import load_backbone
from model.config import ModelConfig
from tests.conftest import EPOCHS, SMALL, assert_same_tensors, write_small_dataset
from utils.checkpoints import load_checkpoint
from utils.models import ModelLoader, build_model
from utils.report import plots
from utils.testing import measure
from utils.testing.measure import scores_by_class
from utils.testing.metrics import METRICS, find_defects

EXTEND = ["--dataset", "small", "--device", "cpu", *EPOCHS, "--loops", "2"]
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def other_root(tmp_path) -> Path:
    """A data set that no checkpoint has seen."""
    write_small_dataset(tmp_path / "other", per_kind=4, classes=("bolt",))
    return tmp_path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_side_by_side(scripts, run, other_root, capsys):
    ckpt = run / "loop_2.pth"
    assert scripts("test", "--ckpt", ckpt, "--dataset", "other", "--device", "cpu", data_root=other_root) == 0
    out, err = capsys.readouterr()
    assert "other: 8 images" in out and "x/loop_0 (base)" in out and "less its base" in out
    assert "average" not in out  # of one class
    assert "NOT ZERO-SHOT" not in err
    rows = read_csv(run / "loop_2_other.csv")
    assert [row["class"] for row in rows] == ["bolt", "average"]
    for row in rows:
        for metric in METRICS:
            assert 0 <= float(row[metric]) <= 1
            difference = float(row[metric]) - float(row[f"{metric}_base"])
            assert float(row[f"{metric}_less_base"]) == pytest.approx(difference)
            assert row[f"{metric}_less_base_low"] == ""  # of eight images
        assert row["trained_on_this_data_set"] == "False" and row["normal"] == row["anomalous"] == "4"
    assert (run / "loop_0_other.csv").exists()


def test_a_folder_means_all_loops_and_training_data_is_said_loudly(scripts, run, other_root, data_root, capsys):
    shutil.copytree(data_root / "small", other_root / "small")
    command = ["test", "--ckpt", run, "--dataset", "small", "other", "--device", "cpu"]
    assert scripts(*command, data_root=other_root) == 0
    out, err = capsys.readouterr()
    assert out.count("x/loop_2 ") == 3 + 1  # two classes and their average, and one class
    assert "test: x/loop_0 (base), x/loop_1, x/loop_2." in err and err.count("NOT ZERO-SHOT") == 1
    assert all(row["trained_on_this_data_set"] == "True" for row in read_csv(run / "loop_1_small.csv"))


def test_data_sets_by_path_are_the_same_data_set(scripts, run, base, data_root, tmp_path, capsys):
    folder = data_root / "small"
    for given in (folder, folder / "full-shot.jsonl"):
        command = ["test", "--ckpt", run / "loop_1.pth", "--dataset", given, "--device", "cpu"]
        assert scripts(*command, data_root=tmp_path) == 0
        assert "NOT ZERO-SHOT" in capsys.readouterr().err
        assert (run / "loop_1_small.csv").exists()
    assert scripts("test", "--ckpt", base, "--dataset", tmp_path / "gone", data_root=tmp_path) == 2
    assert "no such folder or file" in capsys.readouterr().err


def test_runs_of_one_base_share_its_row(scripts, run, base, other_root, tmp_path, capsys):
    twin = shutil.copytree(run, tmp_path / "twin")
    ckpts = [run / "loop_1.pth", twin / "loop_2.pth", base]
    assert scripts("test", "--ckpt", *ckpts, "--dataset", "other", "--device", "cpu", data_root=other_root) == 0
    out, _, _ = capsys.readouterr().out.partition("image: the published score")
    assert out.count("(base)") == 1 and out.count("less its base") == 2 and "twin/loop_2" in out


def test_what_a_silent_base_has_seen_is_unknown(scripts, base, tmp_path, other_root):
    """AA-CLIP's own files do not name their training data."""
    folder = tmp_path / "silent"
    folder.mkdir()
    for name in ("text_adapter.pth", "image_adapter.pth"):
        content = torch.load(base / name, weights_only=True)
        torch.save({k: v for k, v in content.items() if k not in ("config", "environment")}, folder / name)
    command = ["test", "--ckpt", folder, "--dataset", "other", "--model_name", "demo", "--device", "cpu"]
    assert scripts(*command, data_root=other_root) == 0
    assert read_csv(folder / "base_other.csv")[0]["trained_on_this_data_set"] == "unknown"


@pytest.mark.usefixtures("no_estimates")
def test_arguments_from_a_file(scripts, data_root, tmp_path, capsys):
    recipe = tmp_path / "recipe.args"
    lines = ["# a comment", "--dataset small --model_name demo", "", r"--text_epoch 3 --save_path D:\runs\a#1"]
    recipe.write_text("\n".join(lines), encoding="utf-8")
    assert scripts("train", f"@{recipe}", "--text_epoch", "2", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "dataset small" in out and "loop 1  Stage 1  2 epochs" in out and r"Files in D:\runs\a#1" in out
    recipe.write_text('--dataset "small', encoding="utf-8")
    assert scripts("train", f"@{recipe}") == 2
    assert "No closing quotation in the line" in capsys.readouterr().err
    assert scripts("train", f"@{tmp_path / 'gone.args'}") == 2
    assert "gone.args" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])  # as Windows' PowerShell writes
@pytest.mark.usefixtures("no_estimates")
def test_a_file_of_arguments_is_used_from_anywhere(scripts, base, tmp_path, monkeypatch, capsys, encoding):
    shutil.copytree(base, tmp_path / "recipes" / "bases" / "b")
    (tmp_path / "recipes" / "rates.args").write_text("--text_lr 0.25", encoding="utf-8")
    recipe = tmp_path / "recipes" / "deep" / "r.args"
    recipe.parent.mkdir()
    text = "--dataset small --resume bases/b\n@./rates.args --save_path bases/new"
    recipe.write_text(text, encoding=encoding)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert scripts("train_cross_attention", f"@{recipe}", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "0.25" in out and f"Files in {Path('bases/new')}" in out


@pytest.mark.skipif(sys.platform == "win32", reason="paths of that length")
def test_a_data_set_with_a_long_name_has_results(scripts, run, tmp_path, monkeypatch):
    folder = write_small_dataset(tmp_path / ("n" * 240), per_kind=1)
    command = ["test", "--ckpt", run / "loop_1.pth", "--device", "cpu", "--resamples", 5, "--pictures", 1, "--report"]
    assert scripts(*command, "--dataset", folder, "--save_path", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").rglob("*.csv"))) == 4
    monkeypatch.chdir(folder)  # the folder that one is in is a path
    assert scripts(*command, "--dataset", ".", "--save_path", tmp_path / "again") == 0
    names = [{path.name for path in (tmp_path / out).rglob("*")} for out in ("out", "again")]
    assert names[0] == names[1]


def test_contact_sheets(scripts, run, other_root):
    command = ["test", "--ckpt", run / "loop_2.pth", "--dataset", "other", "--device", "cpu"]
    assert scripts(*command, "--pictures", 2, data_root=other_root) == 0
    (path,) = (run / "pictures_other").iterdir()
    width, height = Image.open(path).size
    # The image, two maps and their difference; two images of each kind.
    inches = (plots.PANEL_INCHES * 4 + 1.2) / ((plots.PANEL_INCHES + 0.35) * 4 + 0.9)
    assert width / height == pytest.approx(inches, rel=0.01)


def test_pictures_show_the_pixels_that_the_model_saw(data_root):
    data = open_dataset("small", data_root)
    item = AnomalyDataset(data.folder, data.records, Transform(64))[0]
    shown = to_picture(item["image"])
    image = (
        Image.open(data.folder / data.records[0].image_path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    )
    assert np.abs(shown * 255 - np.asarray(image)).max() < 0.01


def test_a_base_alone(scripts, base, other_root, capsys):
    assert scripts("test", "--ckpt", base, "--dataset", "other", "--device", "cpu", data_root=other_root) == 0
    assert "less its base" not in capsys.readouterr().out
    (row, _) = read_csv(base / "base_other.csv")
    assert "pixel_ap_base" not in row


def test_results_do_not_depend_on_the_batch(scripts, run, other_root):
    found = []
    for size in (1, 5):
        command = ["test", "--ckpt", run / "loop_1.pth", "--dataset", "other", "--batch_size", size, "--device", "cpu"]
        assert scripts(*command, data_root=other_root) == 0
        found.append(read_csv(run / "loop_1_other.csv")[0])
    for metric in METRICS:
        assert float(found[0][metric]) == pytest.approx(float(found[1][metric]), abs=1e-3)


def test_known_good_images_are_seen_and_reported_apart(scripts, run, base, other_root, tmp_path, capsys):
    known = write_small_dataset(tmp_path / "known", per_kind=2, classes=("bolt",))
    for path in known.glob("*/1_*.png"):
        path.unlink()
    ckpt = run / "loop_1.pth"
    words = ["--ckpt", ckpt, "--dataset", "other", "--device", "cpu", "--resamples", "20"]
    assert scripts("test", *words, data_root=other_root) == 0
    assert scripts("test", *words, "--normal_images", known, data_root=other_root) == 0
    shown = capsys.readouterr().out
    assert "Not zero-shot: text cross-attention in the joint space sees 2 known good images of each class." in shown
    for stem, same in (("loop_0", True), ("loop_1", False)):
        alone, beside = (
            (run / f"{stem}_other{name}_images.csv").read_text(encoding="utf-8") for name in ("", "_normal_images")
        )
        assert (alone == beside) is same
    assert scripts("test", *words, "--normal_images", tmp_path / "none", data_root=other_root) == 2
    words[1] = base
    assert scripts("test", *words, "--normal_images", known, data_root=other_root) == 2
    assert "none of these models sees them" in capsys.readouterr().err


def test_undefined_is_printed_as_not_available(scripts, base, tmp_path, capsys):
    folder = write_small_dataset(tmp_path / "ill", classes=("colon",))
    lines = [
        line for line in (folder / "full-shot.jsonl").read_text(encoding="utf-8").splitlines() if '"label": 1' in line
    ]
    (folder / "full-shot.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = ["test", "--ckpt", base, "--dataset", "ill", "--domain", "medical", "--device", "cpu"]
    assert scripts(*command, data_root=tmp_path) == 0
    out = capsys.readouterr().out
    assert "n/a" in out and "nan" not in out
    (row, _) = read_csv(base / "base_ill.csv")
    assert row["image_auroc"] == "" and row["pixel_ap"] != ""


def test_what_runs_in_training_runs_at_test(run, data_root):
    """A loop file rebuilt from its own config sees both contexts: without them its maps and scores differ."""
    checkpoint = load_checkpoint(run / "loop_2.pth")
    backbone = load_backbone("demo")
    data = open_dataset("small", data_root)
    bank = PromptBank(backbone, data.descriptions, data.domain)
    item = AnomalyDataset(data.folder, data.records, Transform(64))[0]

    def found(closed: str | None = None) -> Prediction:
        model = build_model(ModelConfig(**checkpoint.model), backbone, checkpoint, torch.device("cpu"))
        if closed:
            getattr(model, closed).open(0)
        text = ClassText(model, bank, fixed=True)
        return predict(model, item["image"][None], [item["class_name"]], text)

    whole = found()
    assert not torch.equal(whole.maps, found("text_cross_attn").maps)
    assert not torch.equal(whole.detection_scores, found("image_cross_attn").detection_scores)


@pytest.mark.usefixtures("no_estimates")
def test_dry_run_needs_neither_weights_nor_data(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert scripts("train", "--dry_run", data_root=tmp_path) == 0
    plan = capsys.readouterr().out
    for count in ("1,769,472", "589,824", "6,291,456", "3,145,728", "786,432", "2,359,296", "10,223,616"):
        assert count in plan
    assert scripts("train_cross_attention", "--dry_run", "--loops", "4", data_root=tmp_path) == 0
    plan = capsys.readouterr().out
    assert "loop_4.pth" in plan and "text -> image, 4 gates" in plan and "features adapted" in plan
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "0"], "expected at least 1"),
        (["--shot", "3"], "even number"),
        (["--text_lr", "-1"], "expected a number over 0"),
        (["--val_fraction", "1"], "less than 1"),
        (["--val_fraction", "0.95"], "leaves 0 images to train on"),
        (["--val_fraction", "0.01"], "and 0 held out"),
        (["--val_classes", "2"], "expected at most 1 of metal_nut, candle"),
        (["--val_classes", "1", "--val_fraction", "0.1"], "give one of them"),
        (["--text_cross_attn_weight", "nan"], "expected a finite number"),
        (["--device", "abacus"], "--device abacus: not usable here"),
        (["--img_size", "96"], "--img_size 96: contradicts"),
        (["--dataset", "nowhere"], "has no folder of it"),
        (["--text_epoch", "0"], "expected at least 1"),
        (["--surgery_until_layer", "40"], "expected 1 to 13"),
    ],
)
def test_bad_arguments_end_with_2_and_write_nothing(scripts, base, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert scripts("train_cross_attention", *EXTEND, "--resume", base, "--save_path", out, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--img_size", "20"], "expected a multiple of demo's patch of 8 px, for instance 16 or 24"),
        (["--img_size", "24"], "too small for the industrial blur"),
        (["--text_adapt_until", "13"], "expected 1 to 12"),
    ],
)
def test_bad_sizes_end_with_2_and_write_nothing(scripts, tmp_path, capsys, arguments, message):
    assert scripts("train", *SMALL, *EPOCHS, "--save_path", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_empty_mask_and_long_class_name_end_with_2(scripts, base, tmp_path, capsys):
    folder = write_small_dataset(tmp_path / "small")
    out = ["--save_path", tmp_path / "out"]
    command = ["train_cross_attention", *EXTEND, "--resume", base, *out]
    Image.new("L", (48, 40)).save(folder / "candle" / "1_0_mask.png")
    assert scripts(*command, data_root=tmp_path) == 2
    assert "1_0_mask.png: the mask of an anomalous image is empty" in capsys.readouterr().err
    write_small_dataset(tmp_path / "small", classes=("q7" * 60,))
    assert scripts(*command, data_root=tmp_path) == 2
    assert "Shorten the class name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_breaks_during_training_ends_with_1(scripts, base, tmp_path, monkeypatch, capsys):
    path = write_small_dataset(tmp_path / "small") / "candle" / "0_1.png"
    content = path.read_bytes()

    def check_and_break(folder, records, skip_broken=False):
        kept = survey(folder, records, skip_broken)
        path.write_bytes(content[: len(content) // 2])  # the header is whole
        return kept

    command = ["train_cross_attention", *EXTEND, "--resume", base, "--save_path", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr("utils.training.data.survey", check_and_break)
        assert scripts(*command, data_root=tmp_path) == 1
    assert "0_1.png: not readable as an image" in capsys.readouterr().err
    assert (tmp_path / "out" / "state.pth").exists()
    assert scripts(*command[:-1], tmp_path / "new", data_root=tmp_path) == 2  # what is broken before is found before
    assert "0_1.png: not readable as an image" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("grid", "domain", "fits"), [(4, "industrial", True), (3, "industrial", False), (4, "medical", False)]
)
def test_grid_against_blur(grid, domain, fits):
    if fits:
        check_grid(grid, domain)
    else:
        with pytest.raises(ValueError, match="too small"):
            check_grid(grid, domain)


def test_few_shot_list_is_saved(scripts, base, tmp_path):
    command = ["train_cross_attention", *EXTEND, "--resume", base, "--save_path", tmp_path / "out", "--shot", "4"]
    assert scripts(*command) == 0
    assert len((tmp_path / "out" / "4-shot.jsonl").read_text(encoding="utf-8").splitlines()) == 8


def test_every_loop_is_tested_on_eval_datasets_and_training_does_not_notice(scripts, base, run, other_root, data_root):
    shutil.copytree(data_root / "small", other_root / "small")
    command = ["train_cross_attention", *EXTEND, "--resume", base, "--save_path", other_root / "x"]
    assert scripts(*command, "--eval_dataset", "other", data_root=other_root) == 0
    for loop in (0, 1, 2):
        assert len(read_csv(other_root / "x" / f"loop_{loop}_other.csv")) == 2
        assert_same_tensors(other_root / "x" / f"loop_{loop}.pth", run / f"loop_{loop}.pth")
    log = (other_root / "x" / "train.log").read_text(encoding="utf-8")
    assert log.count("less its base") == 2 and "x/loop_2" in log and "Going on" not in log
    assert (other_root / "x" / "training.png").exists()
    tested = read_csv(other_root / "x" / "loop_2_other.csv")
    command = ["test", "--ckpt", other_root / "x" / "loop_2.pth", "--dataset", "other", "--device", "cpu"]
    assert scripts(*command, data_root=other_root) == 0
    for before, after in zip(tested, read_csv(other_root / "x" / "loop_2_other.csv"), strict=True):
        assert [before[name] for name in METRICS] == [after[name] for name in METRICS]


def test_the_base_is_tested_once_and_a_signal_is_obeyed_after_the_batch(
    scripts, base, other_root, data_root, monkeypatch, capsys
):
    shutil.copytree(data_root / "small", other_root / "small")
    command = ["train_cross_attention", *EXTEND, "--resume", base, "--save_path", other_root / "x"]
    command += ["--eval_dataset", "other"]
    tested, defects = [], []

    def noting_scores(bench, contenders, after_batch):
        tested.append([contender.name for contender in contenders])
        return scores_by_class(bench, contenders, after_batch)

    def interrupting(mask):
        if not defects:
            signal.raise_signal(signal.SIGINT)
        defects.append(mask)
        return find_defects(mask)

    monkeypatch.setattr(measure, "scores_by_class", noting_scores)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "find_defects", interrupting)
        assert scripts(*command, data_root=other_root) == 1
    assert "Stopped by SIGINT. The same command goes on from here." in capsys.readouterr().err
    assert len(defects) == 8 and not (other_root / "x" / "loop_1_other.csv").exists()  # one batch
    assert scripts(*command, data_root=other_root) == 0
    assert tested == [["x/loop_0 (base)", "x/loop_1"], ["x/loop_0 (base)", "x/loop_1"], ["x/loop_2"]]
    rows = [read_csv(other_root / "x" / f"loop_{loop}_other.csv")[-1] for loop in (0, 2)]
    assert rows[1]["pixel_ap_base"] == rows[0]["pixel_ap"]


def test_without_evaluation_no_model_is_loaded_again(scripts, base, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(ModelLoader, "__call__", lambda self, checkpoint: loaded.append(checkpoint))
    command = ["train_cross_attention", *EXTEND, "--resume", base, "--save_path", tmp_path / "x", "--loops", "1"]
    assert scripts(*command) == 0 and not loaded


def test_what_does_not_fit_the_model_is_found_before_anything_is_made(scripts, tmp_path, capsys):
    command = ["train", "--model_name", "demo", "--dataset", "demo_train", "--surgery_until_layer", "99"]
    assert scripts(*command, "--save_path", tmp_path / "x", data_root=tmp_path / "data") == 2
    assert "--surgery_until_layer 99: expected 1 to 13" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_mistyped_flag_gets_one_line(scripts, capsys):
    assert scripts("train", "--datasets", "VisA") == 2
    err = capsys.readouterr().err
    assert "unrecognized arguments: --datasets VisA. Did you mean --dataset?" in err and err.count("\n") == 1


def test_the_state_of_a_run_is_no_checkpoint(scripts, run, capsys):
    assert scripts("test", "--ckpt", run / "state.pth", "--dataset", "small") == 2
    assert "the state of a run" in capsys.readouterr().err


def test_an_unknown_eval_dataset_ends_with_2_before_training(scripts, base, tmp_path, capsys):
    command = ["train_cross_attention", *EXTEND, "--resume", base, "--save_path", tmp_path / "out"]
    assert scripts(*command, "--eval_dataset", "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tensorboard_is_written_where_it_is_installed(scripts, base, tmp_path, capsys, monkeypatch):
    command = ["train_cross_attention", *EXTEND, "--resume", base, "--tensorboard"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it was not
    assert scripts(*command, "--save_path", tmp_path / "without") == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "without").exists()
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    pytest.importorskip("tensorboard")
    assert scripts(*command, "--save_path", tmp_path / "with") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "with" / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("Stage 2, epoch/loss")]
    logged = [row for row in read_csv(tmp_path / "with" / "log.csv") if (row["kind"], row["stage"]) == ("epoch", "2")]
    assert losses == pytest.approx([float(row["loss"]) for row in logged])


def test_one_image_and_an_empty_mask(scripts, base, tmp_path, capsys):
    folder = write_small_dataset(tmp_path / "one", per_kind=1, classes=("bolt",))
    lines = (folder / "full-shot.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "full-shot.jsonl").write_text(lines[1], encoding="utf-8")
    command = ["test", "--ckpt", base, "--dataset", "one", "--pictures", 2, "--device", "cpu"]
    assert scripts(*command, data_root=tmp_path) == 0
    out, err = capsys.readouterr()
    assert "0 normal and 1 anomalous images" in out and "All scores of a class are equal" in err
    (row, _) = read_csv(base / "base_one.csv")
    assert row["image_auroc"] == "" and row["pixel_aupro"] != ""
    Image.new("L", (48, 40)).save(folder / "bolt" / "1_0_mask.png")
    assert scripts(*command, data_root=tmp_path) == 2
    assert "1_0_mask.png: the mask of an anomalous image is empty" in capsys.readouterr().err


def test_scripts_start_as_commands():
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    for script in ("train_cross_attention.py", "predict.py"):  # the others begin alike
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "--clip_weights" in done.stdout


@pytest.mark.skipif(not (REAL_DATA / "bsdata").is_dir(), reason="the real data sets are not here")
def test_real_data_sets_can_be_read():
    for name, count in {"mtd": 788, "bsdata": 290}.items():
        data = open_dataset(name, REAL_DATA)
        assert len(data.records) == count
        assert list(data.descriptions.values()) == [
            {"mtd": "magnetic tile surface", "bsdata": "metal ball screw drive"}[name]
        ]
        anomalous = next(record for record in data.records if record.label)
        assert AnomalyDataset(data.folder, [anomalous], Transform(224))[0]["mask"].any()
