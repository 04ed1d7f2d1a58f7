"""The grid of variants: which commands it runs, and what its tables say."""

import csv
import math
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from threading import Thread

import pytest
import torch

from benchmarks import published, traps, variants
from benchmarks.variants import CONTROL, DEFAULT, Given, Job
from tests.conftest import EPOCHS, tensors
from utils.checkpoints import load_checkpoint
from utils.errors import TrainingError, TrainingStoppedError

BAR = Namespace(update=lambda: None)


def row(variant: str, loop: int, seed: int, value: float, ends: tuple[float, float] = (math.nan, math.nan)) -> dict:
    head = {"dataset": "parts", "variant": variant, "loop": loop, "seed": seed, variants.SEEN: "False"}
    sides = dict(zip(("low", "high"), ends, strict=True))
    over_images = {f"{name}_less_control_{end}": v for name in variants.METRICS for end, v in sides.items()}
    return head | dict.fromkeys(variants.METRICS, value) | over_images


def rows() -> list[dict]:
    return [
        *(row("base", 0, seed, value) for seed, value in ((0, 0.50), (1, 0.60))),
        *(row(CONTROL, 1, seed, value) for seed, value in ((0, 0.52), (1, 0.61))),
        *(row(DEFAULT, 1, seed, value, (0.01, 0.03)) for seed, value in ((0, 0.56), (1, 0.63))),
        *(row(DEFAULT, 3, seed, value) for seed, value in ((0, 0.50), (1, 0.70))),
    ]


def test_tables_pair_seeds_and_loops_and_give_intervals_of_t():
    _, said, _, results, _, base, _, control, _, images = variants.report(rows(), "parts").split("\n\n")
    assert "| base | 0 | 55.00 ± 7.07 |" in results and "| joint | 3 | 60.00 ± 14.14 |" in results
    # 12.706 is Student's t for 97.5 % and one degree of freedom.
    assert "| joint | 1 | +4.50 [-14.56, +23.56] |" in base and "| longer base | 1 | +1.50 [-4.85, +7.85] |" in base
    assert "| base |" not in base
    assert "| joint | 1 | +3.00 [-9.71, +15.71] |" in control
    assert "longer base |" not in control and "| joint | 3 |" not in control  # there is no control of this loop
    assert "| joint | 1 | [+1.00, +3.00] |" in images
    assert "After 1 loops" in said and "(2 seeds): not more than seeds differ, not more than" in said
    assert variants.interval([0.02, 0.03, 0.04])[1:] == pytest.approx((0.03 - 0.02484, 0.03 + 0.02484), abs=1e-5)
    assert variants.with_ends(*variants.interval([0.02, math.nan])) == "n/a"
    assert variants.with_ends(0.03, 0.005, 0.055) == "+3.00* [+0.50, +5.50]"
    assert variants.with_ends(-0.00001, math.nan, math.nan) == "+0.00"


def test_the_figure_shows_every_difference(tmp_path):
    variants.draw(rows(), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def arguments_of(**changes) -> Namespace:
    given = {"name": "x", "resume": None, "base_recipe": Path("a.args"), "recipe": Path("b.args"), "jobs": 2}
    given |= {"dataset": ["mvtec_ad"], "variants": [CONTROL, DEFAULT], "data_root": "d", "train_dataset": "parts"}
    given |= {"clip_weights": None, "device": "cpu", "num_workers": None, "precision": None, "tf32": False}
    given["resized_images"] = None
    return Namespace(**given | {"domain": "medical", "class_name": None} | changes)


def test_what_a_seed_trains_and_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "REPOSITORY", tmp_path)
    args, folder = arguments_of(), tmp_path / "ckpt" / "x_7"
    common = ["--dataset", "parts", "--seed", "7", "--data_root", "d", "--device", "cpu"]
    assert variants.base_job(args, 7) == Job(
        folder / "base.log", "train", ["@a.args", *common, "--save_path", str(folder / "base")]
    )
    longer = variants.variant_job(args, 7, CONTROL)
    assert longer.words[: 1 + len(common)] == ["@b.args", *common] and "--feedback off --no_text" in " ".join(
        longer.words
    )
    assert longer.words[longer.words.index("--resume") + 1] == str(folder / "base")
    given = variants.variant_job(arguments_of(resume=Path("ckpt/mine")), 7, DEFAULT)
    assert given.words[given.words.index("--resume") + 1] == "ckpt/mine"
    test = variants.test_job(args, 7).words
    assert test[-6:] == ["--domain", "medical", "--data_root", "d", "--device", "cpu"]
    assert test[test.index("--control") + 1] == str(folder / "longer_base")
    tested = list(variants.tested_files(args, 7))
    assert tested[:5] == [("base", 0), (CONTROL, 1), (CONTROL, 3), (DEFAULT, 1), (DEFAULT, 3)]
    assert tested[5:] == [
        ("base, untrained joint", 0),
        ("longer base, untrained joint", 3),
        ("longer base, untrained joint, another image", 3),
        ("joint, another image", 3),
    ]
    assert list(variants.given_of(arguments_of(variants=[CONTROL]))) == list(variants.GIVEN)[:3]
    intervals = [f"{name}_less_control_{end}" for name in variants.METRICS for end in ("low", "high")]
    for number, ((variant, loop), path) in enumerate(variants.tested_files(args, 7).items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        more = intervals if variant != CONTROL and loop else []
        with open(path.with_name(f"{path.stem}_MVTec.csv"), "w", newline="", encoding="utf-8") as file:
            others = [0.5] * (len(variants.METRICS) - 2)
            lines = [["class", *variants.METRICS, *more, variants.SEEN], ["bolt", 9, 9, *others, *more, "True"]]
            csv.writer(file).writerows([*lines, ["average", number, "", *others, *[0.1] * len(more), "False"]])
    found = variants.read_results(args, 7)
    assert [one[intervals[0]] == 0.1 for one in found] == [False, False, False, True, True, False, True, True, True]
    assert [one["pixel_auroc"] for one in found] == [*range(9)] and found[0][variants.SEEN] == "False"
    assert math.isnan(found[0]["pixel_ap"]) and found[0]["image_ap"] == 0.5 and found[0]["dataset"] == "MVTec"
    with pytest.raises(ValueError, match="no column gain"):
        variants.read_average(path.with_name(f"{path.stem}_MVTec.csv"), ["pixel_ap", "gain"])


def test_time_is_estimated_for_the_model_of_the_base(base, data_root, monkeypatch, tmp_path):
    (tmp_path / "x.args").write_text("--dataset small --device cpu --text_epoch 2 --image_epoch 3", encoding="utf-8")
    measured = []
    names = [*(f"Stage 1 step, {when}" for when in ("loop 1", "later loops")), "Stage 2 step"]
    seconds = dict.fromkeys([*names, "evaluation, both cross-attentions"], 1.0)
    monkeypatch.setattr(variants, "seconds_of_steps", lambda config, *_: measured.append(config) or seconds)
    args = arguments_of(resume=base, recipe=tmp_path / "x.args", base_recipe=None, dataset=["small"], domain=None)
    vars(args).update(data_root=data_root, train_dataset=None, seeds=[0, 1])
    # Two seeds of two variants, 3 loops of 2 + 3 epochs of 20 images; 9 models tested on 20.
    assert variants.estimate(args) == pytest.approx(2 * (2 * 3 * 5 * 20 + 9 * 20) / 3600)
    assert [(config.model_name, config.img_size) for config in measured] == [("demo", 64)]


def test_a_longer_base_is_given_open_gates(scripts, base, monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "REPOSITORY", tmp_path)
    given = {"base, untrained joint": Given(CONTROL, 0, True), "another image": Given(CONTROL, 1, True, "another")}
    monkeypatch.setattr(variants, "GIVEN", given)
    (tmp_path / "x.args").write_text("--text_cross_attn_weight 0.2", encoding="utf-8")
    args = arguments_of(recipe=tmp_path / "x.args", resume=base, train_dataset="small")
    longer = variants.run_folder(args, 0, CONTROL)
    off = ["--feedback", "off", *variants.NO_MODULES, "--loops", "1", "--save_path", longer]
    small = ["--dataset", "small", "--device", "cpu", *EPOCHS]
    assert scripts("train_cross_attention", *small, "--resume", base, *off) == 0
    variants.write_given(args, 0)
    for name, (_, loop, _, image_context) in given.items():
        path = variants.run_folder(args, 0, name) / "loop_1.pth"
        found, source = tensors(path), tensors(longer / f"loop_{loop}.pth")
        assert load_checkpoint(path).model["image_context"] == image_context
        assert torch.equal(found["text_cross_attn.gate"], torch.full((4,), 0.2))
        assert torch.equal(found["image_cross_attn.gate"], torch.full((4,), 1.0))
        assert all(torch.equal(found[key], value) for key, value in source.items())
        assert scripts("test", "--ckpt", path, "--dataset", "small", "--device", "cpu", "--resamples", "20") == 0


def test_traps_are_compared_with_the_published_way(monkeypatch, tmp_path):
    monkeypatch.setattr(traps, "REPOSITORY", tmp_path)
    monkeypatch.setattr(variants, "REPOSITORY", tmp_path)
    chosen = {name: traps.TRAPS[name] for name in (traps.PUBLISHED, "Stage 1 on all four levels")}
    monkeypatch.setattr(traps, "TRAPS", chosen)
    args = arguments_of(dataset="mvtec_ad")
    job = traps.train_job(args, 2, "Stage 1 on all four levels")
    folder = tmp_path / "ckpt" / "x_2" / "Stage_1_on_all_four_levels"
    assert job.words[-4:] == ["--save_path", str(folder), "--stage1_levels", "all"]
    assert traps.test_job(args, 2, "Stage 1 on all four levels").words[:2] == ["--ckpt", str(folder)]
    for seed in (0, 1):
        for number, trap in enumerate(chosen):
            path = traps.base_folder(args, seed, trap) / "base_MVTec.csv"
            path.parent.mkdir(parents=True)
            values = [0.5 + 0.1 * number * (1 + seed)] * len(traps.SHOWN)
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["class", *traps.SHOWN, variants.SEEN], ["average", *values, "False"]])
    lines = traps.table(traps.read_results(args, 0) + traps.read_results(args, 1)).splitlines()
    assert lines[2].startswith("| as published | 50.00 |")
    # 12.706 is Student's t for 97.5 % and one degree of freedom; differences of 10 and 20 points.
    assert lines[3].startswith("| Stage 1 on all four levels | +15.00 [-48.53, +78.53] |")


def test_a_script_that_fails_or_is_stopped_ends_the_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "REPOSITORY", tmp_path)
    (tmp_path / "fails.py").write_text("raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"Exit code 3, see .*output.log"):
        variants.run_all([Job(tmp_path / "logs" / "output.log", "fails", [])], 1, BAR)
    waits = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: exit(print('saved')))\n"
        "print('on', flush=True)\n"
    )
    (tmp_path / "waits.py").write_text(f"{waits}time.sleep(60)", encoding="utf-8")
    logs = [tmp_path / "a.log", tmp_path / "b.log"]

    def stop() -> None:
        while not all("on" in (log.read_text(encoding="utf-8") if log.exists() else "") for log in logs):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    Thread(target=stop).start()
    with pytest.raises(TrainingStoppedError, match="goes on from here"):
        variants.run_all([Job(log, "waits", []) for log in logs], 2, BAR)
    assert all("saved" in log.read_text(encoding="utf-8") for log in logs)


def test_a_checkout_of_the_published_code_is_loaded_beside_ours(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("forward_utils", "test", "model/clip", "model/model"):
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    lines = ["import os, torch", "from model.clip import __name__", "os.environ['TAKEN_BACK'] = '1'"]
    (tmp_path / "train.py").write_text("\n".join([*lines, "torch.set_num_threads(7)"]), encoding="utf-8")
    before = sys.modules["model.adapter"], sys.path.copy(), torch.get_num_threads()
    with pytest.raises(ValueError, match=r"needs more \(No module named 'model.adapter'\). Install: pip"):
        published.load_published(tmp_path)
    (tmp_path / "model" / "adapter.py").write_text("theirs = True", encoding="utf-8")
    assert published.load_published(tmp_path)["model.adapter"].theirs
    assert (sys.modules["model.adapter"], sys.path, torch.get_num_threads()) == before
    assert "TAKEN_BACK" not in os.environ
    with pytest.raises(ValueError, match=r"found no forward_utils.py, model/clip.py. Get one: git clone"):
        published.load_published(published.REPOSITORY)


def test_a_published_loop_ends_after_one_step():
    loader, steps = published.OneBatch({"image": 1}), 0
    with pytest.raises(published.StepDone):
        for _ in loader:
            steps += 1
    assert steps == 1 and loader.seconds >= 0
