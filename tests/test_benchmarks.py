"""The grid of variants: which commands it runs, and what its tables say."""

import csv
import math
import signal
import time
from argparse import Namespace
from pathlib import Path
from threading import Thread

import pytest

from benchmarks import variants
from utils.errors import TrainingError, TrainingStoppedError


def row(variant: str, loop: int, seed: int, value: float) -> dict:
    return {"variant": variant, "loop": loop, "seed": seed} | dict.fromkeys(variants.METRICS, value)


def test_tables_of_differences_pair_seeds_and_loops():
    rows = [
        *(row("base", 0, seed, value) for seed, value in ((0, 0.50), (1, 0.60))),
        *(row(variants.CONTROL, 1, seed, value) for seed, value in ((0, 0.52), (1, 0.61))),
        *(row("both", 1, seed, value) for seed, value in ((0, 0.56), (1, 0.63))),
        *(row("both", 3, seed, value) for seed, value in ((0, 0.50), (1, 0.70))),
    ]
    head, _, results, _, base, _, control = variants.report(rows, "head").split("\n\n")
    assert head == "head"
    assert "| base | 0 | 55.00 ± 7.07 |" in results and "| both | 3 | 60.00 ± 14.14 |" in results
    assert "| both | 1 | +4.50 ± 2.12 |" in base and "| longer base | 1 | +1.50 ± 0.71 |" in base
    assert "| base |" not in base
    assert "| both | 1 | +3.00 ± 1.41 |" in control
    assert "longer base |" not in control and "| both | 3 |" not in control  # there is no control of this loop


def test_a_seed_trains_the_base_and_every_variant_and_tests_all_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "REPOSITORY", tmp_path)
    calls = []

    def call(log: Path, script: str, *words: object) -> None:
        calls.append((script, [str(word) for word in words]))
        if script == "test":
            for number, path in enumerate(words[1 : words.index("--dataset")]):
                stem = path / "base" if path.name == "base" else path.with_suffix("")
                stem.parent.mkdir(parents=True, exist_ok=True)
                with open(stem.with_name(f"{stem.name}_MVTec.csv"), "w", newline="", encoding="utf-8") as file:
                    others = [0.5] * (len(variants.METRICS) - 2)
                    rows = [["class", *variants.METRICS, variants.SEEN], ["bolt", 9, 9, *others, "True"]]
                    rows.append(["average", number, "", *others, "False"])
                    csv.writer(file).writerows(rows)

    monkeypatch.setattr(variants, "call", call)
    chosen = [variants.CONTROL, "both, adapted"]
    args = Namespace(name="x", recipe=["a.args", "b.args"], dataset="mvtec_ad", variants=chosen, data_root="d")
    vars(args).update(train_dataset="parts", clip_weights=None, device="cpu", num_workers=None, precision=None)
    vars(args).update(domain="medical", class_name=None)
    rows = variants.run_seed(args, 7, Namespace(update=lambda: None))
    assert [script for script, _ in calls] == ["train", "train_cross_attention", "train_cross_attention", "test"]
    assert all(words[1:3] == ["--seed", "7"] for script, words in calls if script != "test")
    assert [words[words.index("--dataset") + 1] for _, words in calls] == ["parts"] * 3 + ["mvtec_ad"]
    assert calls[-1][1][-6:] == ["--domain", "medical", "--data_root", "d", "--device", "cpu"]
    assert "--feedback off" in " ".join(calls[1][1]) and "--loops 3" in " ".join(calls[1][1])
    expected = [("base", 0), *((name, loop) for name in chosen for loop in (1, 3))]
    assert [(found["variant"], found["loop"]) for found in rows] == expected
    assert [found["pixel_auroc"] for found in rows] == [0, 1, 2, 3, 4]
    assert math.isnan(rows[0]["pixel_ap"]) and rows[0]["image_ap"] == 0.5
    assert "| longer base | 3 | 200.00 | n/a | 50.00 |" in variants.report(rows, "head")
    assert rows[0][variants.SEEN] == "False"


def test_a_script_that_fails_or_is_stopped_ends_the_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "REPOSITORY", tmp_path)
    (tmp_path / "fails.py").write_text("raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"Exit code 3, see .*output.log"):
        variants.call(tmp_path / "logs" / "output.log", "fails")
    waits = (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: exit(print('saved')))\nprint('on', flush=True)\n"
    )
    (tmp_path / "waits.py").write_text(f"{waits}time.sleep(60)", encoding="utf-8")
    log = tmp_path / "output.log"

    def stop() -> None:
        while "on" not in (log.read_text(encoding="utf-8") if log.exists() else ""):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    Thread(target=stop).start()
    with pytest.raises(TrainingStoppedError, match="goes on from here"):
        variants.call(log, "waits")
    assert "saved" in log.read_text(encoding="utf-8")
