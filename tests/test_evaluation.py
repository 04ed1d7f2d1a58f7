"""What is compared with what, and the rows of the tables."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.sets import open_dataset
from tests.conftest import EPOCHS, write_small_dataset
from utils.checkpoints import Checkpoint, checkpoint_names, load_checkpoint
from utils.report import tables
from utils.testing import bootstrap
from utils.testing.comparison import Comparison, same_but_for_seed
from utils.testing.contenders import Contender, collect
from utils.testing.metrics import METRICS, Sample
from utils.testing.results import AVERAGE, Results, Row


def with_seed(run: Path, folder: Path, seed: int) -> Path:
    """A copy of a run that says it has another seed."""
    shutil.copytree(run, folder)
    for path in folder.glob("loop_*.pth"):
        content = torch.load(path, weights_only=True)
        content["config"]["training"]["seed"] = seed
        torch.save(content, path)
    return folder


def results_at(path: str, values: float, loop: int = 1, seed: int = 0, base: Results | None = None) -> Results:
    """Results of a model in a file that is not there: every metric is `values`, noise of the resamples is shared."""
    training = {"seed": seed, "dataset": "VisA", "image_lr": 5e-4}
    of_base = {"sha256": {}, "datasets": ["VisA"], "training": dict(training)}
    checkpoint = Checkpoint(Path(path), loop, {}, of_base, {}, training, is_loop_file=True)
    contender = Contender(checkpoint, None, "/".join(Path(path).with_suffix("").parts[-2:]))
    noise = np.random.default_rng(0).normal(0, 0.01, 100)
    names = ("bolt", AVERAGE)
    return Results(
        SimpleNamespace(data=SimpleNamespace(name="parts", reported={})),
        contender,
        samples={"bolt": None},
        values={name: dict.fromkeys(METRICS, values) for name in names},
        resampled={name: dict.fromkeys(METRICS, values + noise) for name in names},
        references={"base": base} if base else {},
    )


def compared(*results: Results) -> Comparison:
    return Comparison(results, resamples=100)


def test_loops_bring_their_base_and_their_control(run, tmp_path):
    control = with_seed(run, tmp_path / "control", 111)
    wanted = collect([run / "loop_2.pth"], [control])
    shown = [(entry.checkpoint.path.parent.name, entry.checkpoint.loop) for entry in wanted.values()]
    assert shown == [("x", 0), ("control", 2), ("x", 2)]  # one base for both
    (key,) = [key for key, entry in wanted.items() if entry.checkpoint.path == run / "loop_2.pth"]
    assert list(wanted[key].references) == ["base", "control"]
    with pytest.raises(ValueError, match="expected other runs"):
        collect([run / "loop_0.pth"], [control])
    other = with_seed(run, tmp_path / "other", 5)
    matched = collect([run / "loop_1.pth", other / "loop_1.pth"], [control, with_seed(run, tmp_path / "five", 5)])
    names = {entry.checkpoint.path.parent.name: entry.references.get("control", "") for entry in matched.values()}
    assert names["x"].endswith(str(Path("control", "loop_1.pth"))) and names["other"].endswith(
        str(Path("five", "loop_1.pth"))
    )
    with pytest.raises(ValueError, match="2 are loop 1 of seed 111"):
        collect([run / "loop_1.pth"], [control, with_seed(run, tmp_path / "again", 111)])


def test_names_are_as_long_as_they_must_be():
    paths = ["a/x/loop_1.pth", "b/x/loop_1.pth", "b/x/loop_0.pth", "c/Visa_base"]
    files = [SimpleNamespace(path=Path(path), loop=int("1" in path), is_loop_file="loop" in path) for path in paths]
    assert checkpoint_names(files) == ["a/x/loop_1", "b/x/loop_1", "x/loop_0 (base)", "Visa_base"]


def test_runs_that_differ_in_the_seed_alone_are_pooled():
    bases = [results_at(f"s{seed}/loop_0.pth", 0.5 + 0.01 * seed, 0, seed) for seed in (0, 1)]
    runs = [results_at(f"s{seed}/loop_1.pth", 0.6 + 0.03 * seed, 1, seed, bases[seed]) for seed in (0, 1)]
    other = results_at("s2/loop_1.pth", 0.9, 1, 2)
    other.contender.checkpoint.training["image_lr"] = 1e-3
    assert [len(group) for group in same_but_for_seed([*bases, *runs, other])] == [2, 2]
    rows = compared(*bases, *runs, other).rows[AVERAGE]
    means = {(row.of, row.less): row for row in rows if row.spread}
    name = "mean of s0/loop_1 over seeds 0, 1"
    assert means[name, None].values["pixel_ap"] == pytest.approx(0.615)
    assert means[name, None].spread["pixel_ap"] == pytest.approx(0.03 / math.sqrt(2))
    assert means[name, "base"].values["pixel_ap"] == pytest.approx(0.11)
    runs[1].contender.checkpoint.base["training"]["image_lr"] = 1e-3  # of another kind of base
    assert [len(group) for group in same_but_for_seed([*bases, *runs])] == [2]
    copy = replace(runs[0], contender=replace(runs[0].contender, name="copy"))
    assert same_but_for_seed([runs[0], copy]) == []  # the same seed twice


def test_differences_are_paired():
    base = results_at("x/loop_0.pth", 0.50, 0)
    row = results_at("x/loop_1.pth", 0.52, 1, 0, base).differences["base"][AVERAGE]
    assert row.values["image_ap"] == pytest.approx(0.02)
    assert row.low["image_ap"] == pytest.approx(0.02)  # their noise is the same
    assert row.is_sure("image_ap")
    assert not replace(row, low=dict.fromkeys(METRICS, -0.1)).is_sure("image_ap")
    assert not replace(row, low=dict.fromkeys(METRICS, math.nan), high=dict.fromkeys(METRICS, math.nan)).is_sure(
        "image_ap"
    )


def test_reported_numbers_stand_beside_ours():
    bench = SimpleNamespace(data=SimpleNamespace(reported={"pixel_ap": 45.27}))
    comparison = compared(replace(results_at("x/loop_0.pth", 0.5, 0), bench=bench))
    reported = comparison.rows[AVERAGE][-1]
    assert reported.name.startswith("reported by AA-CLIP") and reported.values["pixel_ap"] == pytest.approx(0.4527)
    assert math.isnan(reported.values["pixel_aupro"])
    (row,) = comparison.rows["bolt"]
    assert row.less is None and row.of == "x/loop_0"


def test_classes_that_an_average_leaves_out_are_named():
    def of_two(path: str, average: float, nut: dict) -> Results:
        one = results_at(path, average)
        return replace(one, samples={"bolt": None, "nut": None}, values={**one.values, "nut": nut})

    undefined = dict.fromkeys(METRICS, 0.5) | {"image_ap": math.nan}
    one = of_two("x/loop_1.pth", 0.5, undefined)
    assert compared(one).left_out == {"image_ap": ["nut"]}
    without = of_two("y/loop_1.pth", math.nan, undefined)  # has no average, so nothing is left out of it
    assert compared(one, without).left_out == {"image_ap": ["nut"]}


def test_percent_and_escapes():
    assert [tables.percent(value, True) for value in (-0.00001, 0.0123, math.nan)] == ["+0.00", "+1.23", "n/a"]
    row = Row("x_1", "base", {"pixel_ap": 0.01}, {"pixel_ap": -0.01}, {"pixel_ap": 0.03})
    assert tables.latex_cell(row, "pixel_ap") == "$+1.00$ {\\scriptsize $[-1.00, +3.00]$}"
    assert tables.latex_text("a_b & 5 %") == "a\\_b \\& 5 \\%"


def test_most_improved_come_first():
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0])
    undefined = np.full(12, math.nan)

    def with_scores(results: Results, scores: np.ndarray) -> Results:
        sample = Sample(
            paths=[""] * 12,
            labels=labels,
            published_scores=scores,
            single_scores=scores,
            pixel_ap=undefined,
            probabilities=None,
            decisions=None,
            pixels=None,
            regions=np.zeros(12),
            low=0.0,
            high=1.0,
        )
        return replace(results, samples={"bolt": sample})

    before = np.linspace(0.3, 0.7, 12)
    after = before + np.array([0.3, -0.3, -0.2, 0.2, 0.1, -0.1, 0.0, 0.05, -0.3, 0.3, 0.2, -0.2])
    base = with_scores(results_at("x/loop_0.pth", 0.5, 0), before)
    run = with_scores(results_at("x/loop_1.pth", 0.5, 1, base=base), after)
    assert run.choose("bolt", 3) == [0, 10, 8, 1, 11, 9]  # a lower score is better on a normal image
    assert len(run.choose("bolt", 50)) == 12
    assert base.choose("bolt", 2) == [0, 2, 1, 3]


def test_side_by_side_with_a_control_and_over_seeds(scripts, run, tmp_path, data_root, capsys, monkeypatch):
    """Twins of one run: their differences are zero, and so is their deviation over seeds."""
    monkeypatch.setattr(bootstrap, "MIN_IMAGES", 5)
    twin, control = with_seed(run, tmp_path / "twin", 5), with_seed(run, tmp_path / "control", 111)
    command = ["test", "--ckpt", run / "loop_2.pth", twin / "loop_2.pth", "--control", control, "--dataset", "small"]
    assert scripts(*command, "--device", "cpu", "--resamples", 50) == 0
    out = capsys.readouterr().out
    assert "mean of x/loop_2 over seeds 5, 111" in out and out.count("less its control") == 2 * 3 + 1
    average = out[out.index("average of 2 classes") :]
    assert "95% from" in average and "± over seeds" in average
    content = json.loads((twin / "comparison_small.json").read_text(encoding="utf-8"))
    rows = {(row["of"], row.get("less")): row for row in content["rows"]["average"]}
    assert rows["mean of x/loop_2 over seeds 5, 111", None]["spread"]["pixel_ap"] == 0
    less = rows["twin/loop_2", "control"]
    assert less["values"]["image_ap"] == 0 == less["high"]["image_ap"]
    assert content["models"][-1]["compared_with"]["control"] == "control/loop_2"
    latex = (twin / "comparison_small.tex").read_text(encoding="utf-8")
    assert latex.count(" & ") > 50 and latex.startswith("\\begin{tabular}{lrrrr") and "\\quad less its base" in latex
    with open(twin / "loop_2_small_images.csv", newline="", encoding="utf-8") as file:
        images = list(csv.DictReader(file))
    assert len(images) == len(open_dataset("small", data_root).records)
    assert {row["decision"] for row in images} <= {"0", "1"} and all(
        0 <= float(row["probability"]) <= 1 for row in images
    )


def test_every_loop_file_has_a_calibration(run, base):
    for name in ("loop_0.pth", "loop_1.pth", "loop_2.pth"):
        fitted = load_checkpoint(run / name).calibration
        assert fitted.images == 20 and not fitted.held_out and 0 < fitted.threshold < 1
    assert load_checkpoint(base).calibration == load_checkpoint(run / "loop_0.pth").calibration


def test_a_calibration_is_held_out_only_where_the_base_saw_none_of_it(scripts, base, tmp_path):
    write_small_dataset(tmp_path / "other", classes=("bolt",))
    write_small_dataset(tmp_path / "small")
    for dataset, held_out in (("small", False), ("other", True)):  # the base was trained on all of small
        command = ["train_cross_attention", "--resume", base, "--dataset", dataset, "--val_fraction", "0.4", *EPOCHS]
        folder = tmp_path / f"on_{dataset}"
        assert scripts(*command, "--loops", "1", "--device", "cpu", "--save_path", folder, data_root=tmp_path) == 0
        assert load_checkpoint(folder / "loop_1.pth").calibration.held_out == held_out


@pytest.mark.parametrize(
    ("source", "seen"), [("VisA", True), ("VisA_own", True), ("MVTec", False), ("MVTec_own", False)]
)
def test_own_images_in_a_folder_called_as_a_known_set_count_as_that(source, seen):
    contender = results_at("run/loop_1.pth", 0.5).contender
    assert contender.was_trained_on(SimpleNamespace(source=source)) is seen
