"""Data sets, their records, and what is drawn from them."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dataset.constants import DATA_SETS, class_prompts, describe_class
from dataset.records import Record, few_shot, hold_out, hold_out_classes, partners, read_records, write_records
from dataset.sets import canonical_name, draw_few_shot, open_all, open_dataset, result_name
from tests.conftest import listing, write_small_dataset


def test_the_label_of_a_partner_says_nothing_of_the_own():
    # In turns, as lists often have them; three of four images of the nut are normal.
    bolts = [Record(f"bolt/{number}.png", number % 2, "bolt") for number in range(2000)]
    nuts = [Record(f"nut/{number}.png", int(number % 4 == 0), "nut") for number in range(2000)]
    found = partners(bolts + nuts, 1)
    assert found == partners(bolts + nuts, 1) != partners(bolts + nuts, 2)
    assert found.keys() == {*bolts, *nuts}
    assert all(other != record and other.class_name == record.class_name for record, other in found.items())
    for members, share in ((bolts, 0.5), (nuts, 0.25)):
        for label in (0, 1):
            labels = [found[record].label for record in members if record.label == label]
            # Six standard deviations of a mean of 500 or more.
            assert abs(sum(labels) / len(labels) - share) < 6 * (0.25 / len(labels)) ** 0.5
    lonely = [Record("a.png", 0, "nut"), Record("b.png", 1, "nut")]
    assert partners(lonely, 0) == {lonely[0]: lonely[1], lonely[1]: lonely[0]}
    with pytest.raises(ValueError, match=r"class 'nut' has one image here, a\.png"):
        partners([lonely[0], lonely[0]], 0)


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
        (lambda s: s[0].update(image_path="gone.png"), FileNotFoundError, "1 of its images .* 'gone.png'"),
        (lambda s: s[5].update(mask_path="gone.png"), FileNotFoundError, "1 of its images .* 'gone.png'"),
        (lambda s: s[0].update(image_path="../x.png"), ValueError, "line 1: .*outside"),
        (lambda s: s[0].update(image_path="/etc/passwd"), ValueError, "line 1: .*outside"),
        (lambda s: s[0].update(image_path="candle/../../x.png"), ValueError, "line 1: .*outside"),
        (lambda s: s[5].update(mask_path="..\\x.png"), ValueError, "line 6: mask_path .*outside"),
        (lambda s: s[0].update(image_path="C:\\x.png"), ValueError, "line 1: .*outside"),
        (lambda s: s[0].update(image_path=None), ValueError, "line 1: image_path is None"),
        (lambda s: s[1].update(class_name=0), ValueError, "line 2: class_name is 0"),
        (lambda s: s[1].update(image_path=""), ValueError, "line 2: image_path is ''"),
        (lambda s: s.clear(), ValueError, "no records"),
        (
            lambda s: s.append(s[0] | {"label": 1, "image_path": f"./{s[0]['image_path']}"}),
            ValueError,
            "is normal in one entry and anomalous in another",
        ),
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


def test_whole_classes_are_held_out():
    records = [Record(f"{name}/{n}.png", n % 2, name, None) for name in "abcd" for n in range(4)]
    train, held_out = hold_out_classes(records, 2, seed=3)
    apart = [{record.class_name for record in part} for part in (train, held_out)]
    assert len(apart[0]) == len(apart[1]) == 2 and not apart[0] & apart[1] and len(train) == 8
    assert hold_out_classes(records, 2, seed=3) == (train, held_out)
    drawn = {tuple(sorted({r.class_name for r in hold_out_classes(records, 2, seed)[1]})) for seed in range(20)}
    assert len(drawn) > 3
    with pytest.raises(ValueError, match="4 classes to hold out: expected at most 3 of a, b, c, d"):
        hold_out_classes(records, 4, seed=3)


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


def test_a_list_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "list.jsonl").mkdir()
    with pytest.raises(OSError):
        write_records(tmp_path / "list.jsonl", [Record("candle/0_0.png", 0, "candle")])
    assert list(tmp_path.rglob("*")) == [tmp_path / "list.jsonl"]


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


@pytest.mark.parametrize("name", ["part.json", "part.jsonl", "meta.json"])
def test_lists_are_lines_arrays_or_anomalyclips(root, name):
    lines = [json.loads(line) for line in (root / "small" / "full-shot.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = open_dataset("small", root).records
    for line in lines:  # as Windows writes paths
        line.update({key: line[key].replace("/", "\\") for key in ("image_path", "mask_path") if key in line})
    content: list | dict = lines
    if name == "meta.json":
        names = {"image_path": "img_path", "label": "anomaly", "class_name": "cls_name"}
        theirs = [{"mask_path": ""} | {names.get(k, k): v for k, v in line.items()} for line in lines]
        split = {kind: [e for e in theirs if e["cls_name"] == kind] for kind in ("candle", "metal_nut")}
        content = {"train": {"candle": theirs[:1]}, "test": split}
    path = root / "small" / name
    path.write_text("\ufeff" + json.dumps(content, indent=1), encoding="utf-8")
    found = open_dataset(str(path), root)
    assert sorted(found.records, key=repr) == sorted(expected, key=repr) and found.source == "small"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": {}}', "expected an array of objects"),
        ('{"test": {"a": {}}}', "expected an array of objects"),
        ("[3]", "entry 1: expected an object with image_path"),
        ('[{"image_path": "a"}', "line 1: not JSON"),
        (
            '{"test": {"a": [{"img_path": "../a", "anomaly": 0, "cls_name": "a"}]}}',
            "entry 1: image_path '../a' lies outside",
        ),
    ],
)
def test_arrays_that_are_no_lists_are_refused(root, text, message):
    (root / "small" / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_dataset(str(root / "small" / "x.json"), root)


def test_class_name_renames_the_one_class_of_unknown_data(root):
    write_small_dataset(root / "one", per_kind=1, classes=("c1",))
    data = open_dataset("one", root, class_name="metal bolt")
    assert data.descriptions == {"metal bolt": "metal bolt"}
    # Other prompts give other results, which do not replace those without.
    assert data.name == "one_metal_bolt" and open_dataset("one", root, class_name="c1").name == "one"
    with pytest.raises(ValueError, match="names the one class of a data set; this has candle, metal_nut"):
        open_dataset("small", root, class_name="metal bolt")
    write_small_dataset(root / "mtd", per_kind=1, classes=("magnetic_tile",))
    with pytest.raises(ValueError, match="mtd has its own names"):
        open_dataset("mtd", root, class_name="tile")


@pytest.mark.parametrize(
    ("given", "name", "source"),
    [
        ("visa_20220922", "VisA", "VisA"),
        ("part.jsonl", "part.jsonl", "part.jsonl"),  # no path, so the name of a folder
        ("data/demo_test", "demo_test", "demo_test"),
        ("data/demo_test/full-shot.jsonl", "demo_test", "demo_test"),
        ("data/demo_test/FULL-SHOT.JSONL", "demo_test", "demo_test"),
        ("data/demo_test/part.jsonl", "demo_test_part", "demo_test"),
        ("data/mvtec_ad/16-shot.JSONL", "MVTec_16-shot", "MVTec"),
        ("data/bolts/new lot, v1.2 ß螺.jsonl", "bolts_new lot, v1.2 ß螺", "bolts"),
        ("data/demo/test.jsonl", None, "demo"),  # demo_test
        ("data/mvtec/ad.jsonl", None, "MVTec"),  # a name of MVTec's folder
        ("data/bolts/part .jsonl", None, "bolts"),
        ("data/bolts/part..jsonl", None, "bolts"),
        ("data/bolts/a\nb.jsonl", None, "bolts"),
    ],
)
def test_names_of_results_tell_a_part_from_the_whole(given, name, source):
    assert canonical_name(given) == source
    if name:
        assert result_name(given) == name
    else:
        with pytest.raises(ValueError, match=r"(?s)files about it .*ename"):
            result_name(given)


def test_a_part_of_a_data_set_goes_by_its_own_name(root, caplog):
    write_small_dataset(root / "MVTec", per_kind=2, classes=("bottle",))
    whole = open_dataset("MVTec", root)
    write_records(root / "MVTec" / "part.jsonl", whole.records[:3])
    write_records(root / "MVTec" / "2-shot.jsonl", whole.records[1:3])
    caplog.clear()
    part = open_dataset(str(root / "MVTec" / "part.jsonl"), "nowhere")
    assert (part.name, part.source, part.folder) == ("MVTec_part", "MVTec", root / "MVTec")
    assert part.records == whole.records[:3] and part.descriptions == {"bottle": "dark bottle"}
    assert "MVTec_part: bottle: 2 normal and 1 anomalous images, published are 20 and 63" in caplog.text
    assert draw_few_shot(part, 2, seed=1) == whole.records[1:3]
    assert [data.name for data in open_all(["MVTec", str(root / "MVTec" / "part.jsonl")], root)] == [
        "MVTec",
        "MVTec_part",
    ]
    for twice in ("MVTec", "MVTec/full-shot.jsonl"):
        with pytest.raises(ValueError, match="2 data sets are called MVTec, and so would be their files"):
            open_all(["MVTec", str(root / twice)], root)


@pytest.mark.usefixtures("no_estimates")
def test_results_of_a_part_leave_those_of_the_whole(scripts, run, data_root, tmp_path, capsys):
    folder = shutil.copytree(data_root / "small", tmp_path / "small")
    records = open_dataset("small", tmp_path).records
    write_records(folder / "part.jsonl", records[:10])
    copy = shutil.copytree(run, tmp_path / "x")
    part, before = folder / "part.jsonl", listing(copy)
    assert scripts("test", "--ckpt", copy / "loop_1.pth", "--dataset", part, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert "small_part: 10 images" in out and "NOT ZERO-SHOT" in err
    after = listing(copy)
    assert "loop_1_small_part.csv" in after and before.items() <= after.items()
    assert all("small_part" in path for path in after.keys() - before.keys())
    assert scripts("train_cross_attention", "--dry_run", "--eval_dataset", part) == 0
    assert "loop_<k>_small_part.csv" in capsys.readouterr().out


def test_a_part_is_not_called_as_another_folder(root, monkeypatch):
    write_records(root / "small" / "part.jsonl", open_dataset("small", root).records[:3])
    given = str(root / "small" / "part.jsonl")
    (root / "elsewhere" / "small_part").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"would be called small_part, as those about the folder .*elsewhere"):
        open_dataset(given, root / "elsewhere")
    assert open_dataset(given, "nowhere").name == "small_part"
    (root / "small_part").mkdir()
    monkeypatch.chdir(root / "small")
    for path in (given, f".{os.sep}part.jsonl", f"..{os.sep}small{os.sep}part.jsonl"):
        with pytest.raises(ValueError, match=r"small_part, as those about the folder .*\. Rename the list\."):
            open_dataset(path, "nowhere")


def test_a_file_that_is_no_list_is_refused(root):
    (root / "small" / "full-shot.jsonl").rename(root / "small" / "full-shot.txt")
    with pytest.raises(ValueError, match=r"expected a folder or a list .*, found a file of another kind"):
        open_dataset(str(root / "small" / "full-shot.txt"), "nowhere")


def test_reported_numbers_are_those_of_the_whole_published_set(root, monkeypatch):
    folder = write_small_dataset(root / "MVTec", per_kind=2, classes=("bottle",))
    assert open_dataset("MVTec", root).reported == {}  # of 83 images, 4
    published = replace(DATA_SETS["MVTec"], counts={"bottle": (2, 2)})
    monkeypatch.setitem(DATA_SETS, "MVTec", published)
    for whole in ("MVTec", str(folder), str(folder / "full-shot.jsonl")):
        assert open_dataset(whole, root).reported == published.reported
    open_dataset("MVTec", root).reported.clear()  # what is given out is a copy
    records = open_dataset("MVTec", root).records
    write_records(folder / "all.jsonl", records)
    assert open_dataset(str(folder / "all.jsonl"), root).reported == {}
    for other in (records[1:], [*records, Record("bottle/0_0.png", 0, "cork")]):
        write_records(folder / "full-shot.jsonl", other)
        assert open_dataset("MVTec", root).reported == {}
    assert published.reported["pixel_ap"] == 45.27 and open_dataset("small", root).reported == {}


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
