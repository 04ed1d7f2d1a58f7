"""Official trees in miniature, own folders, and the commands that write lists and check files."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import check, metadata
from dataset.commands import run_command
from dataset.constants import DATA_SETS
from dataset.demo import build as building
from dataset.images import read_record
from dataset.layouts import LAYOUTS, known_good
from dataset.loading import cache_images
from dataset.prepare import prepare, write_metadata
from dataset.records import Record, write_records
from dataset.sets import OWN, find_dataset, open_all, open_dataset, read_place
from dataset.survey import survey
from dataset.transforms import Transform
from tests.conftest import listing


def picture(path: Path, mask: bool = False) -> None:
    """A small image unlike all others, or a mask with a defect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(str(path).encode())).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    if mask:
        pixels = np.zeros((8, 8), dtype=np.uint8)
        pixels[2:5, 2:5] = 255
    Image.fromarray(pixels).save(path)


def pictures(root: Path, *names: str) -> None:
    for name in names:
        picture(root / name, mask=any(part in name for part in ("ground_truth", "Masks", "label", "masks")))


def mvtec_tree(root: Path) -> list[tuple]:
    pictures(root, "grid/train/good/000.png", "grid/test/good/014.png", "grid/test/good/002.png")
    pictures(root, "grid/test/glue/010.png", "grid/ground_truth/glue/010_mask.png")
    pictures(root, "bottle/test/good/000.png", "bottle/test/broken_large/000.png", "bottle/test/broken_small/000.png")
    pictures(root, "bottle/ground_truth/broken_large/000_mask.png", "bottle/ground_truth/broken_small/000_mask.png")
    (root / "grid" / "test" / "good" / "Thumbs.db").write_bytes(b"x")
    (root / "grid" / "test" / "good" / "._002.png").write_bytes(b"x")
    (root / "license.txt").write_text("text")
    return [
        ("bottle/test/good/000.png", 0, "bottle"),
        ("bottle/test/broken_large/000.png", 1, "bottle", "bottle/ground_truth/broken_large/000_mask.png"),
        ("bottle/test/broken_small/000.png", 1, "bottle", "bottle/ground_truth/broken_small/000_mask.png"),
        ("grid/test/good/002.png", 0, "grid"),
        ("grid/test/good/014.png", 0, "grid"),
        ("grid/test/glue/010.png", 1, "grid", "grid/ground_truth/glue/010_mask.png"),
    ]


def mpdd_tree(root: Path) -> list[tuple]:
    pictures(root, "tubes/test/good/000.png", "tubes/test/anomalous/000.png")
    pictures(root, "tubes/ground_truth/anomalous/000_mask.png", "connector/test/good/1.png")
    return [
        ("connector/test/good/1.png", 0, "connector"),
        ("tubes/test/good/000.png", 0, "tubes"),
        ("tubes/test/anomalous/000.png", 1, "tubes", "tubes/ground_truth/anomalous/000_mask.png"),
    ]


def btad_tree(root: Path) -> list[tuple]:
    pictures(root, "01/train/ok/0000.bmp", "01/test/ok/0022.bmp", "01/test/ko/0000.bmp", "01/ground_truth/ko/0000.png")
    pictures(root, "02/test/ok/0022.png", "02/test/ko/0162.png", "02/ground_truth/ko/0162.png")
    pictures(root, "03/test/ok/0022.bmp", "03/test/ko/0001.bmp", "03/ground_truth/ko/0001.bmp")
    return [
        ("01/test/ok/0022.bmp", 0, "01"),
        ("01/test/ko/0000.bmp", 1, "01", "01/ground_truth/ko/0000.png"),
        ("02/test/ok/0022.png", 0, "02"),
        ("02/test/ko/0162.png", 1, "02", "02/ground_truth/ko/0162.png"),
        ("03/test/ok/0022.bmp", 0, "03"),
        ("03/test/ko/0001.bmp", 1, "03", "03/ground_truth/ko/0001.bmp"),
    ]


def visa_tree(root: Path) -> list[tuple]:
    normal, anomalous = "{}/Data/Images/Normal/{}.JPG", "{}/Data/Images/Anomaly/{}.JPG"
    rows = []
    for class_name in ("candle", "pcb1"):
        mask = f"{class_name}/Data/Masks/Anomaly/000.png"
        rows += [
            (class_name, "train", "normal", normal.format(class_name, "0001"), ""),
            (class_name, "test", "normal", normal.format(class_name, "0790"), ""),
            (class_name, "test", "anomaly", anomalous.format(class_name, "000"), mask),
        ]
    pictures(root, *(name for row in rows for name in row[3:] if name))
    rows.append(("cashew", "test", "normal", "cashew/Data/Images/Normal/1.JPG", ""))  # a class that was not unpacked
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    return [
        (image, int(label == "anomaly"), class_name, *([mask] if mask else []))
        for class_name, split, label, image, mask in rows
        if split == "test" and class_name != "cashew"
    ]


def medical_tree(class_name: str):
    def build(root: Path) -> list[tuple]:
        pictures(root, "train/good/9.png", "test/good/img/7.png", "test/Ungood/img/3.png", "test/Ungood/label/3.png")
        return [
            ("test/good/img/7.png", 0, class_name),
            ("test/Ungood/img/3.png", 1, class_name, "test/Ungood/label/3.png"),
        ]

    return build


def retina_tree(root: Path) -> list[tuple]:
    pictures(root, "RESC/test/good/img/7.png", "RESC/test/ungood/img/3.png")
    picture(root / "RESC/test/ungood/anomaly_mask/3.png", mask=True)
    return [
        ("RESC/test/good/img/7.png", 0, "Retina"),
        ("RESC/test/ungood/img/3.png", 1, "Retina", "RESC/test/ungood/anomaly_mask/3.png"),
    ]


def colon_tree(class_name: str):
    def build(root: Path) -> list[tuple]:
        pictures(root, "images/2.jpg", "images/1.png", "masks/1.png", "masks/2.jpg")
        return [
            ("images/1.png", 1, class_name, "masks/1.png"),
            ("images/2.jpg", 1, class_name, "masks/2.jpg"),
        ]

    return build


def loco_tree(root: Path) -> list[tuple]:
    pictures(root, "pushpins/train/good/0.png", "pushpins/validation/good/1.png", "pushpins/test/good/000.png")
    pictures(root, "pushpins/test/logical_anomalies/000.png", "pushpins/test/structural_anomalies/000.png")
    pictures(root, *(f"pushpins/ground_truth/logical_anomalies/000/00{n}.png" for n in range(2)))
    pictures(root, "pushpins/ground_truth/structural_anomalies/000/000.png")
    return [
        ("pushpins/test/good/000.png", 0, "pushpins"),
        *(
            (f"pushpins/test/{kind}/000.png", 1, "pushpins", f"pushpins/ground_truth/{kind}/000")
            for kind in ("logical_anomalies", "structural_anomalies")
        ),
    ]


def depth_tree(root: Path) -> list[tuple]:
    for kind in ("good", "crack"):
        pictures(root, *(f"bagel/test/{kind}/{part}/000.png" for part in ("rgb", "gt", "xyz")))
    pictures(root, "bagel/train/good/rgb/000.png")
    picture(root / "bagel/test/crack/gt/000.png", mask=True)
    return [
        ("bagel/test/good/rgb/000.png", 0, "bagel"),
        ("bagel/test/crack/rgb/000.png", 1, "bagel", "bagel/test/crack/gt/000.png"),
    ]


def public_tree(root: Path) -> list[tuple]:
    pictures(root, "can/test_public/good/0_regular.png", "can/test_public/bad/1_regular.png", "can/train/good/2.png")
    pictures(root, "can/test_public/ground_truth/bad/1_regular_mask.png", "can/test_private/3_regular.png")
    mask = "can/test_public/ground_truth/bad/1_regular_mask.png"
    return [
        ("can/test_public/good/0_regular.png", 0, "can"),
        ("can/test_public/bad/1_regular.png", 1, "can", mask),
    ]


def ksdd2_tree(root: Path) -> list[tuple]:
    pictures(root, "train/0.png", "test/1.png", "test/2.png")
    Image.new("L", (8, 8)).save(root / "test" / "1_GT.png")
    picture(root / "test" / "2_GT.png", mask=True)
    return [("test/1.png", 0, "KSDD2"), ("test/2.png", 1, "KSDD2", "test/2_GT.png")]


def dagm_tree(root: Path) -> list[tuple]:
    pictures(root, "Class1/Train/1.PNG", "Class1/Test/1.PNG", "Class1/Test/2.PNG")
    picture(root / "Class1/Test/Label/2_label.PNG", mask=True)
    return [
        ("Class1/Test/1.PNG", 0, "Class1"),
        ("Class1/Test/2.PNG", 1, "Class1", "Class1/Test/Label/2_label.PNG"),
    ]


def goods_tree(root: Path) -> list[tuple]:
    pictures(root, "food_box/test/good/1.jpg", "food_box/test/deformed/2.jpg", "food_box/ground_truth/deformed/2.png")
    return [
        ("food_box/test/good/1.jpg", 0, "food_box"),
        ("food_box/test/deformed/2.jpg", 1, "food_box", "food_box/ground_truth/deformed/2.png"),
    ]


def real_iad_tree(root: Path) -> list[tuple]:
    entries = []
    for name in ("bottle_cap", "audiojack"):
        (root / "realiad_jsons" / "realiad_jsons").mkdir(parents=True, exist_ok=True)
        rows = [
            {"category": name, "anomaly_class": "OK", "image_path": "OK/S1/a.jpg", "mask_path": None},
            {
                "category": name,
                "anomaly_class": "HS",
                "image_path": "NG/HS/S2/b.jpg",
                "mask_path": "NG/HS/S2/b_mask.png",
            },
        ]
        table = {"meta": {"normal_class": "OK"}, "train": rows[:1], "test": rows}
        (root / "realiad_jsons" / "realiad_jsons" / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
        for size in (256, 512):
            pictures(root / f"realiad_{size}" / name, "OK/S1/a.jpg", "NG/HS/S2/b.jpg", "NG/HS/S2/b_mask.png")
        place = f"realiad_512/{name}"
        entries.append((f"{place}/OK/S1/a.jpg", 0, name))
        entries.append((f"{place}/NG/HS/S2/b.jpg", 1, name, f"{place}/NG/HS/S2/b_mask.png"))
    return [*entries[2:], *entries[:2]]  # in the published order of the classes


TREES = {
    "MVTec": ("mvtec_ad", mvtec_tree),
    "MPDD": ("MPDD", mpdd_tree),
    "BTAD": ("BTech_Dataset_transformed", btad_tree),
    "VisA": ("VisA_20220922", visa_tree),
    "MVTec-LOCO": ("mvtec_loco_anomaly_detection", loco_tree),
    "MVTec-3D": ("mvtec_3d_anomaly_detection", depth_tree),
    "MVTec-AD-2": ("mvtec_ad_2", public_tree),
    "KSDD2": ("KolektorSDD2", ksdd2_tree),
    "DAGM": ("DAGM_KaggleUpload", dagm_tree),
    "GoodsAD": ("GoodsAD", goods_tree),
    "Real-IAD": ("Real-IAD", real_iad_tree),
    "Brain": ("MedAD/Brain_AD", medical_tree("Brain")),
    "Liver": ("MedAD/Liver_AD", medical_tree("Liver")),
    "Retina": ("MedAD/Retina_RESC_AD", retina_tree),
    "Colon_clinicDB": ("Colon/CVC-ClinicDB", colon_tree("Colon_clinicDB")),
    "Colon_colonDB": ("Colon/CVC-ColonDB", colon_tree("Colon_colonDB")),
    "Colon_Kvasir": ("Colon/Kvasir", colon_tree("Kvasir")),
    "Colon_cvc300": ("Colon/CVC-300", colon_tree("CVC-300")),
}


# Whose numbers of images by class are not known for sure.
NOT_COUNTED = {"DAGM", "Real-IAD"}


def as_lines(entries: list[tuple]) -> list[dict]:
    keys = ("image_path", "label", "class_name", "mask_path")
    return [dict(zip(keys, entry, strict=False)) for entry in entries]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def command(monkeypatch):
    """Calls dataset.metadata or dataset.check as from the command line; returns the exit code."""

    def call(module, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            run_command(module.main)
        return exit_info.value.code

    return call


@pytest.mark.parametrize("name", TREES)
def test_the_list_of_every_official_tree(tmp_path, command, capsys, name):
    folder, build = TREES[name]
    expected = as_lines(build(tmp_path / folder))
    assert command(metadata, name, "--data_root", tmp_path) == 0
    assert read_lines(tmp_path / folder / "full-shot.jsonl") == expected
    printed = capsys.readouterr().out
    assert f"{name}: {len(expected)} images" in printed
    for class_name, (normal, anomalous) in DATA_SETS[name].counts.items():
        assert f"DIFFERS: {normal} + {anomalous}" in printed
        assert class_name in printed
    assert command(metadata, name, "--data_root", tmp_path) == 0
    assert "full-shot.jsonl says the same" in capsys.readouterr().out


def test_every_benchmark_set_has_a_layout_and_counts():
    assert set(TREES) | {"mtd", "bsdata"} == {name for name, info in DATA_SETS.items() if info.layout}
    for name, info in DATA_SETS.items():
        if info.layout:
            assert info.layout in (*LAYOUTS, OWN)
            assert set(info.counts) == (set() if name in NOT_COUNTED else set(info.classes))
    totals = {name: sum(map(sum, info.counts.values())) for name, info in DATA_SETS.items()}
    assert (totals["VisA"], totals["MVTec"], totals["BTAD"], totals["MPDD"]) == (2162, 1725, 741, 458)
    assert len(DATA_SETS["Real-IAD"].classes) == 30
    assert (totals["MVTec-AD-2"], totals["GoodsAD"]) == (1084, 1328 + 1660)
    assert (totals["MVTec-LOCO"], totals["MVTec-3D"], totals["KSDD2"]) == (1568, 1197, 1004)
    assert (totals["Brain"], totals["Liver"], totals["Retina"], totals["Colon_Kvasir"]) == (3715, 1493, 1805, 1000)


def test_opening_reads_the_official_layout_and_writes_nothing(tmp_path, monkeypatch, command, caplog):
    folder, build = TREES["MVTec"]
    expected = as_lines(build(tmp_path / folder))
    monkeypatch.setattr("dataset.sets.METADATA", tmp_path / "metadata")
    before = listing(tmp_path)
    for name, root in (("MVTec", tmp_path), ("mvtec", tmp_path), (str(tmp_path / folder), "nowhere")):
        caplog.clear()
        data = open_dataset(name, root)
        assert data.name == data.source == "MVTec"  # in any case, as folders are on Windows
        assert [record.image_path for record in data.records] == [line["image_path"] for line in expected]
        assert data.descriptions == {"bottle": "dark bottle", "grid": "metal or plastic mesh"}
        assert "bottle: 1 normal and 2 anomalous images, published are 20 and 63" in caplog.text
    assert open_all(["MVTec"], tmp_path)[0].records == read_place(find_dataset("MVTec", tmp_path)) == data.records
    assert command(check, "MVTec", "--data_root", tmp_path) == 1
    assert listing(tmp_path) == before


def refuse_writing(monkeypatch, folder: Path) -> None:
    """Make a folder read-only to lists; file modes do not bind the administrator, whom tests may run as."""

    def write(path: Path, records: list[Record]) -> None:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        write_records(path, records)

    monkeypatch.setattr("dataset.prepare.write_records", write)


@pytest.mark.parametrize("is_read_only", [False, True])
@pytest.mark.parametrize("is_path", [False, True])
def test_preparing_writes_the_list_that_is_missing(tmp_path, monkeypatch, caplog, is_read_only, is_path):
    folder, build = TREES["MVTec"]
    expected = as_lines(build(tmp_path / folder))
    monkeypatch.setattr("dataset.sets.METADATA", tmp_path / "metadata")
    caplog.set_level("INFO", "dataset")
    path = tmp_path / folder / "full-shot.jsonl"
    if is_read_only:
        refuse_writing(monkeypatch, path.parent)
        path = tmp_path / "metadata" / "MVTec" / "full-shot.jsonl"
    name, root = (str(tmp_path / folder), "nowhere") if is_path else ("mvtec_ad", tmp_path)
    read = open_dataset(name, root).records
    before = listing(tmp_path / folder)
    prepare(name, root)
    assert (listing(tmp_path / folder) == before) is is_read_only
    assert read_lines(path) == expected and open_dataset(name, root).records == read
    assert f"MVTec: wrote {path}, 6 images of its official layout." in caplog.text
    assert ("full-shot.jsonl cannot be written (Permission denied)." in caplog.text) is is_read_only
    before, known = listing(tmp_path), len(caplog.records)
    prepare(name, root)
    prepare(str(path), root)
    assert listing(tmp_path) == before and len(caplog.records) == known


def test_an_older_list_that_cannot_be_replaced_is_named(tmp_path, monkeypatch):
    folder, build = TREES["MVTec"]
    build(tmp_path / folder)
    records = open_dataset("MVTec", tmp_path).records
    refuse_writing(monkeypatch, tmp_path / folder)
    (tmp_path / folder / "full-shot.jsonl").write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match=r"full-shot.jsonl cannot be replaced"):
        write_metadata(find_dataset("MVTec", tmp_path), records)


def test_a_list_that_names_other_images_is_kept(tmp_path, command, caplog):
    folder, build = TREES["MPDD"]
    build(tmp_path / folder)
    path = tmp_path / folder / "full-shot.jsonl"
    path.write_text('{"image_path": "mine.png", "label": 0, "class_name": "tubes"}', encoding="utf-8")
    assert command(metadata, "MPDD", "--data_root", tmp_path) == 2
    assert "is another list: 1 of its 1 lines are not in the official layout, which has 3 more" in caplog.text
    assert "mine.png" in path.read_text()
    path.write_text("{broken", encoding="utf-8")
    assert command(metadata, "MPDD", "--data_root", tmp_path, "--overwrite") == 0
    assert len(read_lines(path)) == 3


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("MVTec", "grid/ground_truth/glue/010_mask.png", r"1 of its images and masks .*'grid/.*/010_mask.png'"),
        ("VisA", "candle/Data/Masks/Anomaly/000.png", r"1 of its images and masks .*candle/Data/Masks/Anomaly/000.png"),
        ("VisA", "split_csv/1cls.csv", "1cls.csv: no such file. It belongs to VisA's download"),
        ("Colon_Kvasir", "masks/1.png", r"1 of its images and masks .* the first is 'masks/1_mask.png'"),
    ],
)
def test_an_incomplete_download_is_named(tmp_path, name, spoil, message):
    folder, build = TREES[name]
    build(tmp_path / folder)
    (tmp_path / folder / spoil).unlink()
    before = listing(tmp_path)
    for use in (open_dataset, prepare):
        with pytest.raises(FileNotFoundError, match=message):
            use(name, tmp_path)
    assert listing(tmp_path) == before


def test_own_folder_of_one_product_and_of_several(tmp_path, caplog):
    caplog.set_level("INFO", "dataset")
    one = tmp_path / "metal_bolt"
    pictures(one, "test/good/a.png", "test/bent/b.png", "ground_truth/bent/b.png", "train/good/c.png")
    data = open_dataset(str(one), "nowhere")
    assert [(r.image_path, r.label, r.mask_path) for r in data.records] == [
        ("test/good/a.png", 0, None),
        ("test/bent/b.png", 1, "ground_truth/bent/b.png"),
    ]
    assert data.descriptions == {"metal_bolt": "metal bolt"} and data.domain == "industrial"
    before = listing(one)
    prepare(str(one), "nowhere")
    assert listing(one) == before  # the folder is read anew each time, so that images can be added
    assert "metal_bolt: 1 normal images, 1 anomalous ones, 1 masks in its folder." in caplog.text
    several = tmp_path / "parts"
    pictures(several, "nut/good/a.png", "nut/bad/b.JPG", "cap/test/OK/a.png", "cap/test/dent/b.png")
    pictures(several, "cap/test/.ipynb_checkpoints/a-checkpoint.png")
    data = open_dataset("parts", tmp_path, "medical")
    assert data.descriptions == {"cap": "cap", "nut": "nut"} and data.domain == "medical"
    assert {(r.image_path, r.label, r.mask_path) for r in data.records} == {
        ("cap/test/OK/a.png", 0, None),
        ("cap/test/dent/b.png", 1, None),
        ("nut/good/a.png", 0, None),
        ("nut/bad/b.JPG", 1, None),
    }


def test_a_folder_without_normal_images_is_said_loudly(tmp_path, caplog):
    pictures(tmp_path, "bolts/test/fine/a.png", "bolts/test/bent/b.png")
    open_dataset("bolts", tmp_path)
    assert (
        "no image is normal: folders called good, ok, normal, ... are, those found are defects: bent, fine."
    ) in caplog.text


@pytest.mark.parametrize(
    ("name", "images", "own"),
    [
        ("MVTec", ("screw/test/good/0.png", "screw/test/bent/1.png", "gearbox/test/good/2.png"), "gearbox"),
        ("mvtec_ad", ("gearbox/OK/0.png", "gearbox/NG/1.png"), "gearbox"),
        ("Brain", ("good/0.png", "bad/1.png"), "Brain"),
        ("VisA", ("parts/good/0.png", "parts/bad/1.png"), "parts"),
        ("KSDD2", ("good/0.png", "bad/1.png"), "KSDD2"),
    ],
)
def test_own_products_in_a_folder_that_is_called_as_a_known_set(tmp_path, command, caplog, capsys, name, images, own):
    pictures(tmp_path / name, *images)
    before = listing(tmp_path)
    for given in (name, str(tmp_path / name)):
        caplog.clear()
        prepare(given, tmp_path)
        data = open_dataset(given, tmp_path)
        assert len(data.records) == len(images) and own in data.descriptions
        assert data.name == data.source and data.source.endswith("_own")
        assert caplog.text.count(f"holds what that does not ({own})") == 1
    assert command(check, name, "--data_root", tmp_path) == 1
    assert f"called as another: {tmp_path / name} is called as" in capsys.readouterr().out
    known = data.source.removesuffix("_own")
    assert command(metadata, known, "--data_root", tmp_path) == 2 and listing(tmp_path) == before


def test_products_in_mixed_layouts_are_all_read_or_said(tmp_path, command, caplog, capsys):
    parts = tmp_path / "parts"
    pictures(parts, "a/good/0.png", "b/OK/1.png", "b/NG/2.png", "c/Test/good/3.png", "c/Test/bent/4.png")
    pictures(parts, "c/Ground Truth/bent/4_gt.png", "c/Ground Truth/bent/9.png", "c/train/good/5.png", "d/photos/6.png")
    pictures(parts, "e/normal/7.png", "e/defective/8.png", "e/masks/8.png", "f/good/9.png", "f/scratch/10.png")
    pictures(parts, *(f"g/{place}.png" for place in ("good/1", "crack/2", "mask/crack/2", "colour/3", "mask/colour/3")))
    found = {(r.image_path, r.label, r.mask_path) for r in open_dataset("parts", tmp_path).records}
    assert found == {
        ("a/good/0.png", 0, None),
        ("b/OK/1.png", 0, None),
        ("b/NG/2.png", 1, None),
        ("c/Test/good/3.png", 0, None),
        ("c/Test/bent/4.png", 1, "c/Ground Truth/bent/4_gt.png"),
        ("e/normal/7.png", 0, None),
        ("e/defective/8.png", 1, "e/masks/8.png"),
        ("f/good/9.png", 0, None),
        ("g/good/1.png", 0, None),  # as in the Folder that anomalib describes
        ("g/colour/3.png", 1, "g/mask/colour/3.png"),
        ("g/crack/2.png", 1, "g/mask/crack/2.png"),
    }
    said = (
        "1 images in d/photos are not read",
        "1 images in f/scratch are not read",
        "1 masks in c/Ground Truth/bent are",
    )
    assert command(check, "parts", "--data_root", tmp_path) == 1
    printed = capsys.readouterr().out
    assert all(f"not read: parts, {line}" in printed and caplog.text.count(line) == 1 for line in said)


def test_several_masks_of_an_image_count_together(tmp_path):
    folder = tmp_path / "MVTec-LOCO"
    loco_tree(folder)
    path = folder / "pushpins/ground_truth/logical_anomalies/000/001.png"
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(path)
    data = open_dataset("MVTec-LOCO", tmp_path)
    expected = np.eye(8, dtype=bool)
    expected[2:5, 2:5] = True
    assert np.array_equal(np.asarray(read_record(data.folder, data.records[1])[1]) > 0, expected)
    assert cache_images(data.folder, data.records, Transform(8)) is not None
    Image.new("L", (9, 9), 255).save(path)
    with pytest.raises(ValueError, match=r"000: not readable as a mask \(expected masks of one size in it"):
        read_record(data.folder, data.records[1])


# What people have: files, and (image, label, mask) of the images that are read. Masks: files called *_m*, or in masks.
UNTIDY = {
    "masks beside images": (
        ("bolt/good/0.png", "bolt/good/0_mask.png", "bolt/bad/1.png", "bolt/bad/1_mask.png", "bolt/bad/2.png"),
        {("bolt/good/0.png", 0, None), ("bolt/bad/1.png", 1, "bolt/bad/1_mask.png"), ("bolt/bad/2.png", 1, None)},
    ),
    "masks beside images of a test split": (
        ("bolt/test/good/0.png", "bolt/test/bent/1.png", "bolt/test/bent/1_gt.png"),
        {("bolt/test/good/0.png", 0, None), ("bolt/test/bent/1.png", 1, "bolt/test/bent/1_gt.png")},
    ),
    "kinds of one name but for a space": (
        *(("b/test/good/0.png", "b/test/big hole/1.png", "b/test/big-hole/1.png", "b/masks/big hole/1.png")),
        "b/masks/big-hole/1.png",
        {
            ("b/test/good/0.png", 0, None),
            ("b/test/big hole/1.png", 1, "b/masks/big hole/1.png"),
            ("b/test/big-hole/1.png", 1, "b/masks/big-hole/1.png"),
        },
    ),
    "a kind that is called as masks are": (
        ("cap/test/good/0.png", "cap/test/label/1.png", "cap/ground_truth/label/1_mask.png"),
        {("cap/test/good/0.png", 0, None), ("cap/test/label/1.png", 1, "cap/ground_truth/label/1_mask.png")},
    ),
    "products that are called as splits and masks are": (
        ("train/good/0.png", "train/bad/1.png", "label/good/2.png", "label/bad/3.png"),
        {("train/good/0.png", 0, None), ("train/bad/1.png", 1, None)}
        | {("label/good/2.png", 0, None), ("label/bad/3.png", 1, None)},
    ),
    "folders within kinds": (
        *(("nut/good/lot 1/0.png", "nut/good/lot 2/0.png", "nut/bad/crack/1.png", "nut/bad/hole/1.png")),
        *(("nut/masks/bad/crack/1.png", "nut/masks/bad/hole/1.png")),
        {("nut/good/lot 1/0.png", 0, None), ("nut/good/lot 2/0.png", 0, None)}
        | {(f"nut/bad/{kind}/1.png", 1, f"nut/masks/bad/{kind}/1.png") for kind in ("crack", "hole")},
    ),
    "products of several depths": (
        ("lines/a/nut/good/0.png", "lines/a/nut/NG/1.png", "cap/OK/2.png", "cap/NG/3.png"),
        {("lines/a/nut/good/0.png", 0, None), ("lines/a/nut/NG/1.png", 1, None)}
        | {("cap/OK/2.png", 0, None), ("cap/NG/3.png", 1, None)},
    ),
    "products within the test split": (
        ("test/nut/good/0.png", "test/nut/bad/1.png", "test/cap/good/2.png", "train/nut/good/3.png"),
        {("test/nut/good/0.png", 0, None), ("test/nut/bad/1.png", 1, None), ("test/cap/good/2.png", 0, None)},
    ),
    "images and masks": (
        ("polyps/images/0.jpg", "polyps/images/1.jpg", "polyps/masks/1.jpg"),
        {("polyps/images/0.jpg", 0, None), ("polyps/images/1.jpg", 1, "polyps/masks/1.jpg")},
    ),
    "images and masks of a test split, with tables of labels": (
        ("polyps/test/images/0.jpg", "polyps/test/images/1.jpg", "polyps/test/masks/1.jpg", "polyps/test/labels/1.txt"),
        {("polyps/test/images/0.jpg", 0, None), ("polyps/test/images/1.jpg", 1, "polyps/test/masks/1.jpg")},
    ),
    "words of other languages, and umlauts as macOS writes them": (
        ("a/i.O./0.png", "a/n.i.O./1.png", "b/良品/0.png", "b/不良/\u00d6l.png", "b/masks/不良/O\u0308l.png"),
        {("a/i.O./0.png", 0, None), ("a/n.i.O./1.png", 1, None), ("b/良品/0.png", 0, None)}
        | {("b/不良/\u00d6l.png", 1, "b/masks/不良/O\u0308l.png")},
    ),
    "masks of some kinds only": (
        ("nut/good/0.png", "nut/bad/5.png", "nut/masks/5.png", "nut/masks/old/9.png"),
        {("nut/good/0.png", 0, None), ("nut/bad/5.png", 1, "nut/masks/5.png")},
    ),
}


@pytest.mark.parametrize("name", UNTIDY)
def test_untidy_trees_are_read_as_a_person_would(tmp_path, name):
    *files, expected = UNTIDY[name]
    files = [file for part in files for file in ([part] if isinstance(part, str) else part)]
    for file in files:
        if file.endswith(".txt"):
            (tmp_path / "desk" / file).parent.mkdir(parents=True)
            (tmp_path / "desk" / file).write_text("0 0.5 0.5 0.1 0.1", encoding="utf-8")
        else:
            picture(tmp_path / "desk" / file, mask="mask" in file or "_gt" in file)
    found = open_dataset("desk", tmp_path).records
    assert {(record.image_path, record.label, record.mask_path) for record in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("test/crack/0.png", "test/hole/0.png", "masks/0.png"), "masks/0.png: the mask of test/crack/0.png or of"),
        (("good/1.png", "bad/0.png", "masks/bad/0.png", "masks/bad/0.jpg"), "is its mask .*0.jpg or 0.png"),
        (("good/1.png", "bad/0.png", "bad/0_mask.png", "masks/bad/0.png"), "is its mask .* Keep one of them"),
        (("test/0.png", "test/1.png", "masks/0.png", "masks/1_defect.png"), "1_defect.png: the mask of no image in"),
    ],
)
def test_masks_that_are_of_several_images_or_of_none_are_refused(tmp_path, files, message):
    for file in files:
        picture(tmp_path / "bolt" / file, mask="mask" in file)
    with pytest.raises(ValueError, match=message):
        open_dataset("bolt", tmp_path)


def test_what_is_not_read_is_said_with_the_reason(tmp_path, caplog):
    pictures(tmp_path / "nut", "test/good/0.png", "test/bent/1.png", "test/overview.png", "good/2.png", "other/3.png")
    pictures(tmp_path / "cap", "OK/1.png")
    open_dataset("nut", tmp_path)
    for line in (
        "1 images in test are not read: no folder above them says",
        "1 images in good are not read: the test split beside them is.",
        "1 images in other are not read: the test split beside them is.",
    ):
        assert line in caplog.text
    open_dataset("cap", tmp_path)
    assert "cap: no image is anomalous: folders called bad," in caplog.text


def test_what_is_no_image_by_its_name_or_all_of_one_kind_is_found_by_the_check(tmp_path, command, capsys):
    pictures(tmp_path / "nut", "test/bad/0.png", "test/bad/1.JPE")
    for name in ("2.heic", "3.CR2", "notes.txt", "Thumbs.db"):
        (tmp_path / "nut/test/bad" / name).write_bytes(b"x")
    assert command(check, "nut", "--data_root", tmp_path) == 1
    found = capsys.readouterr().out
    assert "not read: nut, 2 files in test/bad are no images by their names: 2.heic, 3.CR2\n" in found
    assert "of one kind: nut, nut: no image is normal" in found and "2 images are readable" in found


def test_lists_that_contradict_themselves_or_are_empty_are_found_by_the_check(tmp_path, command, capsys):
    pictures(tmp_path / "nut", "0.png")
    line = '{"image_path": "0.png", "label": %d, "class_name": "nut"}'
    path = tmp_path / "nut" / "full-shot.jsonl"
    for text, expected in ((f"{line % 0}\n{line % 1}", "two labels: 0.png"), ("\n", "no images: nut, ")):
        path.write_text(text, encoding="utf-8")
        assert command(check, "nut", "--data_root", tmp_path) == 1
        assert expected in capsys.readouterr().out


def test_lines_in_a_file_called_json_are_read(tmp_path):
    pictures(tmp_path / "nut", "0.png", "1.png")
    lines = [json.dumps({"image_path": f"{n}.png", "label": n, "class_name": "nut"}) for n in range(2)]
    (tmp_path / "nut" / "part.json").write_text("\n".join(lines), encoding="utf-8")
    assert len(open_dataset(str(tmp_path / "nut" / "part.json"), tmp_path).records) == 2


def test_links_that_lead_back_are_not_followed_for_ever(tmp_path):
    pictures(tmp_path / "nut", "good/0.png", "bad/1.png")
    try:
        (tmp_path / "nut/bad/again").symlink_to(tmp_path / "nut", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert len(open_dataset("nut", tmp_path).records) == 2


def test_a_broken_mask_of_a_flat_set_is_left_for_the_survey(tmp_path):
    ksdd2_tree(tmp_path / "KSDD2")
    (tmp_path / "KSDD2/test/2_GT.png").write_bytes(b"no image")
    data = open_dataset("KSDD2", tmp_path)
    assert [record.label for record in data.records] == [0, 1]
    with pytest.raises(ValueError, match=r"2_GT.png: not readable as a mask"):
        survey(data.folder, data.records)


def test_classes_that_are_not_there_are_said(tmp_path, caplog):
    dagm_tree(tmp_path / "DAGM")
    pictures(tmp_path / "DAGM", "Class2/Test/1.PNG")  # whose labels are missing
    open_dataset("DAGM", tmp_path)
    assert "9 of 10 classes have no images: Class2, Class3" in caplog.text


def test_products_that_a_list_does_not_name_are_said(tmp_path, caplog):
    folder, build = TREES["MVTec"]
    build(tmp_path / folder)
    prepare("MVTec", tmp_path)
    pictures(tmp_path / folder, "gearbox/test/good/0.png", "gearbox/test/bent/1.png")
    data = open_dataset("MVTec", tmp_path)
    assert set(data.descriptions) == {"bottle", "grid"}
    assert "full-shot.jsonl, so not read: gearbox." in caplog.text


@pytest.mark.parametrize("masks", ["ground_truth", "Ground_Truth", "GroundTruth", "masks", "Masks", "gt", "label"])
@pytest.mark.parametrize("flat", [True, False])
def test_folders_of_masks_have_many_names(tmp_path, masks, flat):
    folder = f"{masks}" if flat else f"{masks}/bent"
    pictures(tmp_path / "bolt", "test/good/0.png", "test/bent/1.png", f"{folder}/1_mask.png")
    assert open_dataset("bolt", tmp_path).records[1].mask_path == f"{folder}/1_mask.png"


@pytest.mark.parametrize(
    "mask",
    ["1.png", "1_mask.png", "1_gt.png", "1_seg.png", "1_GT.PNG", "mask_1.png", "1.bmp.png", "1.bmp_mask.png", "1.gif"],
)
def test_masks_have_many_names(tmp_path, mask):
    pictures(tmp_path / "bolt", "test/good/0.png", "test/bent/1.bmp", f"ground_truth/bent/{mask}")
    assert open_dataset("bolt", tmp_path).records[1].mask_path == f"ground_truth/bent/{mask}"


def test_a_mask_belongs_to_one_image(tmp_path):
    pictures(tmp_path / "bolt", "test/good/0.png", "test/bent/1.png", "test/bent/1.jpg", "ground_truth/bent/1_mask.png")
    with pytest.raises(ValueError, match=r"1_mask.png: the mask of 1.jpg or of 1.png\?"):
        open_dataset("bolt", tmp_path)
    for suffix in ("jpg", "png"):  # which says whose it is
        pictures(tmp_path / "bolt", f"ground_truth/bent/1.{suffix}.png")
    found = open_dataset("bolt", tmp_path).records
    assert [r.mask_path for r in found] == [None, "ground_truth/bent/1.jpg.png", "ground_truth/bent/1.png.png"]


def test_a_mask_that_is_not_found_is_said_with_what_lies_there(tmp_path):
    pictures(tmp_path / "bolt", "test/good/0.png", "test/bent/1.png", "ground_truth/bent/one.png")
    with pytest.raises(FileNotFoundError, match=r"the mask of 'test/bent/1.png' \(its folder has one.png\)\."):
        open_dataset("bolt", tmp_path)


def test_folders_of_known_sets_are_found_in_any_case(tmp_path):
    for name in ("MVTec", "Brain"):
        folder, build = TREES[name]
        build(tmp_path / folder.lower())
        for given in (name, name.lower(), name.upper()):
            assert open_dataset(given, tmp_path).source == name
    pictures(tmp_path / "Bolts", "good/0.png")
    assert open_dataset("bolts", tmp_path).folder == tmp_path / "Bolts"
    if not (tmp_path / "BOLTS").exists():  # where the two are two folders, the spelling that is given is tried first
        pictures(tmp_path / "bolts", "good/0.png", "good/1.png")
        assert len(open_dataset("bolts", tmp_path).records) == 2


def test_likely_mistakes_get_a_hint(tmp_path, monkeypatch):
    pictures(tmp_path, "data/VisA/candle.png", "bolts/good/a.png", "bolts/bad/b.png")
    monkeypatch.chdir(tmp_path)
    for name, root, hint in (
        ("VisA", "data/VisA", "--data_root is the folder above those of the data sets: try data."),
        ("bolts", "data", f"A folder elsewhere is given as a path: .{os.sep}bolts."),
        ("Visum", "data", "known: Brain, Liver"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            open_dataset(name, root)
        assert hint in str(error.value)


def test_a_folder_in_no_known_layout_shows_the_trees(tmp_path):
    pictures(tmp_path, "bolts/fine/a.png")
    with pytest.raises(FileNotFoundError) as error:
        open_dataset("bolts", tmp_path)
    for part in ("bolts/test/good/*.png", "bolts/good/*.png and", "full-shot.jsonl", "Found fine."):
        assert part in str(error.value)


def test_known_good_images_of_every_class(tmp_path):
    for name, count in (("bolt", 2), ("nut", 2), ("cap", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (9, 9)).save(tmp_path / name / f"{number}.png")
    found = known_good(tmp_path, ["bolt", "nut"], [tmp_path / "cap" / "0.png"])
    assert [len(images) for images in found.values()] == [2, 2] and list(found) == ["bolt", "nut"]
    assert known_good(tmp_path / "nut", ["nut"], []) == {"nut": found["nut"]} == known_good(tmp_path, ["nut"], [])
    with pytest.raises(ValueError, match="as many images of each class, found bolt 2, cap 1"):
        known_good(tmp_path, ["bolt", "cap"], [])
    with pytest.raises(FileNotFoundError, match="no images of screw"):
        known_good(tmp_path, ["bolt", "screw"], [])
    with pytest.raises(ValueError, match=r"bolt.0\.png is an image of the test"):
        known_good(tmp_path, ["bolt"], [tmp_path / "cap" / ".." / "bolt" / "0.png"])


def test_training_and_testing_on_images_without_masks(tmp_path, scripts, capsys):
    folder = tmp_path / "bolts"
    pictures(folder, *(f"{kind}/{number}.png" for kind in ("good", "bad") for number in range(4)))
    small = ["--model_name", "demo", "--device", "cpu", "--text_epoch", "1", "--image_epoch", "1"]
    base = tmp_path / "base"
    command = ["train", "--dataset", folder, "--class_name", "metal bolt", *small, "--save_path", base]
    assert scripts(*command) == 0
    printed = capsys.readouterr().err
    assert printed.count("4 of 4 anomalous images have no mask: no segmentation loss.") == 1
    assert "the anomaly maps learn to find none" in printed
    assert "This CLIP knows nothing of these words in the prompts: metal." in printed
    assert f"--dataset {folder} --class_name 'metal bolt'" in printed  # of the command that comes next
    assert scripts("test", "--ckpt", base, "--dataset", folder, "--class_name", "metal bolt", "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert "metal bolt" in captured.out and "NOT ZERO-SHOT" in captured.err
    values = captured.out.split("  base ")[1].split()
    assert values[:4] == ["n/a"] * 4 and "n/a" not in values[4:]


def spoiled_tree(root: Path) -> None:
    """A tree with one fault of every kind."""
    pictures(root, "test/good/0.png", "test/good/1.png", "test/good/2.png", "train/good/9.png")
    pictures(root, *(f"test/bent/{n}.png" for n in range(5)), *(f"ground_truth/bent/{n}.png" for n in range(5)))
    pictures(root, "ground_truth/good/0.png")
    (root / "test/good/1.png").write_bytes((root / "test/good/1.png").read_bytes()[:60])
    Image.open(root / "test/good/2.png").save(root / "train/good/9.png", compress_level=1)
    Image.new("L", (8, 8)).save(root / "ground_truth/bent/0.png")
    Image.new("L", (4, 8), 255).save(root / "ground_truth/bent/1.png")
    (root / "ground_truth/bent/2.png").write_bytes(b"")
    (root / "test/bent/4.png").unlink()
    lines = [{"image_path": f"test/good/{n}.png", "label": 0, "class_name": "bolt"} for n in range(3)]
    lines[0]["mask_path"], lines[2]["mask_path"] = "ground_truth/good/0.png", "ground_truth/good/2.png"
    for number in range(5):
        image, mask = f"test/bent/{number}.png", f"ground_truth/bent/{number}.png"
        lines.append({"image_path": image, "label": 1, "class_name": "bolt", "mask_path": mask})
    (root / "full-shot.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (root / "ground_truth/bent/3.png").unlink()


def test_check_lists_every_kind_of_fault(tmp_path, command, capsys):
    spoiled_tree(tmp_path / "bolts")
    assert command(check, "bolts", "--data_root", tmp_path) == 1
    found = capsys.readouterr().out.replace(f"{tmp_path / 'bolts'}{os.sep}", "").replace(os.sep, "/").splitlines()
    assert found[0] == "mask of a normal image: ground_truth/good/0.png"
    assert found[1].startswith("unreadable image: test/good/1.png: not readable as an image")
    assert found[2] == "empty mask of an anomalous image: ground_truth/bent/0.png"
    assert found[3] == "size mismatch: ground_truth/bent/1.png is 4 x 8, its image 8 x 8"
    assert found[4].startswith("unreadable mask: ground_truth/bent/2.png: not readable as a mask")
    assert found[5:7] == ["missing mask: ground_truth/bent/3.png", "missing image: test/bent/4.png"]
    assert found[7].startswith("doubtful masks: bolts, 1 of 3 masks call more than 75% of their image a defect: 1.png.")
    assert found[8:] == ["same image: test/good/2.png, train/good/9.png", "9 problems found; 7 images are readable."]


def test_check_compares_data_sets_and_is_quiet_where_all_is_well(tmp_path, command, capsys, caplog):
    for name in ("here", "there"):
        pictures(tmp_path, f"{name}/test/good/0.png", f"{name}/test/bent/1.png", f"{name}/ground_truth/bent/1.png")
    assert command(check, "here", tmp_path / "there", "--data_root", tmp_path) == 0
    assert capsys.readouterr().out == "4 images, all well.\n"
    Image.open(tmp_path / "here/test/good/0.png").save(tmp_path / "there/test/bent/1.png")
    assert command(check, "here", "there", "--data_root", tmp_path) == 1
    assert "same image: " in capsys.readouterr().out
    assert command(check, "here", "gone", "--data_root", tmp_path) == 2
    assert "has no folder of it" in caplog.text


def test_check_lists_what_an_incomplete_download_lacks(tmp_path, command, capsys):
    folder, build = TREES["MVTec"]
    build(tmp_path / folder)
    for kind in ("broken_large", "broken_small"):
        (tmp_path / folder / "bottle" / "ground_truth" / kind / "000_mask.png").unlink()
    assert command(check, "MVTec", "--data_root", tmp_path) == 1
    found = capsys.readouterr().out
    assert found.count("missing mask: ") == 2
    assert "number of images: MVTec, bottle: 1 normal and 2 anomalous images, published are 20 and 63" in found
    assert not (tmp_path / folder / "full-shot.jsonl").exists()


def test_the_metadata_command_renders_demo_sets_and_the_check_does_not(tmp_path, monkeypatch, command, capsys):
    monkeypatch.setattr(building, "IMAGES_PER_CLASS", 2)
    assert command(check, "demo_test", "--data_root", tmp_path) == 2 and not list(tmp_path.iterdir())
    for _ in range(2):  # and once more, where it is there
        assert command(metadata, "demo_test", "--data_root", tmp_path) == 0
        assert capsys.readouterr().out == f"demo_test: 24 images in {tmp_path / 'demo_test'}\n"
    before = listing(tmp_path)
    assert command(check, "demo_test", "--data_root", tmp_path) == 0
    assert capsys.readouterr().out == "24 images, all well.\n" and listing(tmp_path) == before


def test_a_split_table_of_other_columns_is_named(tmp_path):
    visa_tree(tmp_path / "VisA")
    table = tmp_path / "VisA" / "split_csv" / "1cls.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(",", ";"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"1cls.csv: expected the columns object, split"):
        open_dataset("VisA", tmp_path)
