"""Data sets, their records, and what is drawn from them."""

import json
import time
from pathlib import Path

import pytest

from dataset.constants import DATA_SETS, class_prompts, describe_class
from dataset.records import Record, few_shot, hold_out, read_records, write_records
from dataset.sets import draw_few_shot, open_dataset
from tests.conftest import write_small_dataset


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
    records = read_records(path)
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
    assert "does not exist" in str(error.value) and "VisA_20220922" in str(error.value)
    (tmp_path / "VisA").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1cls.csv: no such file"):
        open_dataset("VisA", tmp_path)
    (tmp_path / "MVTec").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither full-shot\.jsonl nor images in the official layout"):
        open_dataset("MVTec", tmp_path)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda s: s[2].pop("label"), ValueError, "line 3: .*label is missing"),
        (lambda s: s[2].update(label=2), ValueError, "line 3: label is 2"),
        (lambda s: s[0].update(image_path="gone.png"), FileNotFoundError, "1 of the images .* 'gone.png'"),
        (lambda s: s[5].update(mask_path="gone.png"), FileNotFoundError, "1 of the images .* 'gone.png'"),
        (lambda s: s[0].update(image_path="../x.png"), ValueError, "line 1: .*outside"),
        (lambda s: s[0].update(image_path="/etc/passwd"), ValueError, "line 1: .*outside"),
        (lambda s: s[0].update(image_path="candle/../../x.png"), ValueError, "line 1: .*outside"),
        (lambda s: s[5].update(mask_path="..\\x.png"), ValueError, "line 6: mask_path .*outside"),
        (lambda s: s[0].update(image_path="C:\\x.png"), ValueError, "line 1: .*outside"),
        (lambda s: s[0].update(image_path=None), ValueError, "line 1: image_path is None"),
        (lambda s: s[1].update(class_name=0), ValueError, "line 2: class_name is 0"),
        (lambda s: s[1].update(image_path=""), ValueError, "line 2: image_path is ''"),
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
    assert read_records(tmp_path / "list.jsonl") == records


def test_a_list_of_few_shots_is_used_where_it_lies(root, monkeypatch, tmp_path, caplog):
    data = open_dataset("small", root)
    assert draw_few_shot(data, 4, seed=1) == few_shot(data.records, 4, seed=1)
    monkeypatch.setattr("dataset.sets.METADATA", tmp_path / "metadata")
    for folder, chosen in ((tmp_path / "metadata" / "small", data.records[:3]), (root / "small", data.records[5:7])):
        folder.mkdir(parents=True, exist_ok=True)
        write_records(folder / "4-shot.jsonl", chosen)
        assert draw_few_shot(data, 4, seed=1) == chosen
    assert draw_few_shot(data, 2, seed=1) == few_shot(data.records, 2, seed=1)
    write_records(root / "small" / "4-shot.jsonl", [*data.records[:2], Record("other.png", 0, "screw")])
    with pytest.raises(ValueError, match=r"1 of its 3 lines are not in the data set's own list, one is of 'other.png'"):
        draw_few_shot(data, 4, seed=1)


def test_class_name_renames_the_one_class_of_unknown_data(root):
    write_small_dataset(root / "one", per_kind=1, classes=("c1",))
    assert open_dataset("one", root, class_name="metal bolt").descriptions == {"metal bolt": "metal bolt"}
    with pytest.raises(ValueError, match="names the one class of a data set; this has candle, metal_nut"):
        open_dataset("small", root, class_name="metal bolt")
    write_small_dataset(root / "mtd", per_kind=1, classes=("magnetic_tile",))
    with pytest.raises(ValueError, match="mtd has its own names"):
        open_dataset("mtd", root, class_name="tile")


def test_names_beyond_ascii_and_lists_in_other_places(root):
    write_small_dataset(root / "Prüfling ü", per_kind=1, classes=("Schraube ß", "螺丝"))
    data = open_dataset(str(root / "Prüfling ü"), "nowhere")
    assert list(data.descriptions) == ["Schraube ß", "螺丝"] and data.name == "Prüfling ü"
    listed = root / "Prüfling ü" / "part.jsonl"
    write_records(listed, data.records[:2])
    assert open_dataset(str(listed), "nowhere").records == data.records[:2]
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        open_dataset(str(root / "gone.jsonl"), "nowhere")


def test_a_hundred_thousand_lines_are_read_in_seconds(root):
    line = json.dumps({"image_path": "candle/0_0.png", "label": 0, "class_name": "candle"})
    (root / "small" / "full-shot.jsonl").write_text(f"{line}\n" * 100_000, encoding="utf-8")
    started = time.monotonic()
    assert len(open_dataset("small", root).records) == 100_000
    assert time.monotonic() - started < 30  # 2 s where this was written
