"""The folder that keeps images and masks at the model's size."""

import errno
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import resized
from dataset.loading import AnomalyDataset, SeededSampler, make_loader
from dataset.records import Record
from dataset.resized import ResizedImages
from dataset.sets import open_dataset
from dataset.transforms import Transform
from tests.conftest import EPOCHS, SMALL, assert_same_tensors, listing, write_small_dataset
from utils.files import read_csv


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_small_dataset(tmp_path / "small", per_kind=4)


@pytest.fixture
def records(folder) -> list[Record]:
    return open_dataset("small", folder.parent).records


@pytest.fixture
def images(folder, tmp_path) -> ResizedImages:
    return ResizedImages(tmp_path / "resized" / "here", folder, 32)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The images whose own files are read."""
    found: list[str] = []
    read = resized.read_record

    def seen(folder: Path, record: Record):
        found.append(record.image_path)
        return read(folder, record)

    monkeypatch.setattr(resized, "read_record", seen)
    return found


def is_same(first, second) -> bool:
    """Whether two items, or two batches, have the same tensors."""
    return torch.equal(first["image"], second["image"]) and torch.equal(first["mask"], second["mask"])


@pytest.mark.parametrize("stage", [None, "text", "image"])
@pytest.mark.parametrize("augment", ["published", "smooth"])
def test_tensors_are_those_of_the_files(folder, records, images, reads, stage, augment):
    transform = Transform(32, stage, augment)
    plain = AnomalyDataset(folder, records, transform)
    kept = AnomalyDataset(folder, records, transform, images)
    for _ in range(2):
        assert all(is_same(plain[index, 7], kept[index, 7]) for index in range(len(records)))
    served = (stage, augment) != ("image", "published")
    assert images.serves(transform) == served and not images.serves(Transform(40, stage, augment))
    # Each was read once, or never where the jitter comes first.
    assert sorted(reads) == sorted(record.image_path for record in records if served)
    assert len(list(images.place.iterdir())) == len(reads)


def test_a_file_that_has_changed_is_read_anew(folder, records, images, reads):
    record = records[-1]
    image, mask = folder / record.image_path, folder / record.mask_path
    images.read(record)
    for path in (image, mask):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        images.read(record)
        images.read(record)
    assert len(reads) == 3
    status = image.stat()
    Image.new("RGB", (48, 40), "red").save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))  # another size alone
    assert np.asarray(images.read(record)[0]).tolist() == np.full((32, 32, 3), (255, 0, 0)).tolist()
    assert len(reads) == 4 and len(list(images.place.iterdir())) == 1


def test_what_is_read_in_another_way_is_kept_apart(folder, records, images, reads):
    ways = [records[-1], *(replace(records[-1], **way) for way in ({"bits": 12}, {"lossy": True}, {"reduced_to": 64}))]
    other = ResizedImages(images.place, folder, 40)
    for _ in range(2):
        assert {images.read(way)[0].size for way in ways} == {(32, 32)} and other.read(ways[0])[0].size == (40, 40)
    assert len(reads) == len(list(images.place.iterdir())) == 5


def test_a_folder_of_masks_counts_with_all_its_files(folder, records, images, reads):
    record = replace(records[-1], mask_path="masks")
    (folder / "masks").mkdir()
    shutil.copy(folder / records[-1].mask_path, folder / "masks" / "0.png")
    assert np.array_equal(images.read(record)[1], images.read(records[-1])[1])
    Image.new("L", (48, 40), 255).save(folder / "masks" / "1.png")
    assert np.asarray(images.read(record)[1]).min() == 255
    assert len(reads) == 3


def damaged(content: bytes) -> dict[str, bytes]:
    """What may become of a file."""
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    other = {"image": b"\x93NUMPY", "nothing": b"", "half": content[: len(content) // 2], "flipped": bytes(flipped)}
    return other | {"pickle": b"\x80\x04N."}


@pytest.mark.parametrize("kind", damaged(b"123"))
def test_a_damaged_file_is_made_anew(records, images, reads, kind):
    before = images.read(records[-1])
    (path,) = images.place.iterdir()
    content = path.read_bytes()
    path.write_bytes(damaged(content)[kind])
    after = images.read(records[-1])
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert len(reads) == 2 and path.read_bytes() == content


def test_arrays_of_another_form_are_made_anew(records, images, reads):
    images.read(records[-1])
    (path,) = images.place.iterdir()
    with np.load(path) as file:
        stamps, image, mask = file["stamps"], file["image"], file["mask"]
    for wrong in ({"image": image[:, :, :1]}, {"image": image.astype(float)}, {"mask": mask[1:]}):
        np.savez(path, **({"stamps": stamps, "image": image, "mask": mask} | wrong))
        assert [picture.size for picture in images.read(records[-1])] == [(32, 32)] * 2
    assert len(reads) == 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_place_that_takes_no_files_is_said_once(folder, records, images, reads, monkeypatch, caplog, code):
    images.read(records[0])

    @contextmanager
    def full(path: Path):
        raise OSError(code, os.strerror(code), str(path))
        yield

    monkeypatch.setattr(resized, "replacing", full)
    for _ in range(2):
        for record in records:
            images.read(record)
    assert len(reads) == 1 + 2 * (len(records) - 1)  # what is there is used
    assert caplog.text.count("--resized_images") == 1 and os.strerror(code) in caplog.text


def test_several_readers_share_a_place(folder, records, images):
    """Worker processes, and threads as of other programs."""
    transform = Transform(32, "text")

    def epoch(cache: ResizedImages | None, workers: int) -> list[torch.Tensor]:
        dataset = AnomalyDataset(folder, records, transform, cache)
        loader = make_loader(dataset, 5, workers, SeededSampler(len(dataset), (1, 2)))
        return [batch[part] for batch in loader for part in ("image", "mask")]

    others = [ResizedImages(images.place, folder, 32) for _ in range(3)]
    threads = [threading.Thread(target=lambda one=one: [one.read(record) for record in records]) for one in others]
    for thread in threads:
        thread.start()
    found = epoch(images, 2)
    for thread in threads:
        thread.join()
    plain = epoch(None, 0)
    assert all(map(torch.equal, found, plain)) and all(map(torch.equal, epoch(images, 1), plain))
    assert len(list(images.place.iterdir())) == len(records)


def test_what_cannot_be_read_is_said_as_without(folder, records, images):
    (folder / records[-1].image_path).write_bytes(b"no image")
    with pytest.raises(ValueError, match="not readable as an image"):
        images.read(records[-1])
    (folder / records[-1].image_path).unlink()
    with pytest.raises(ValueError, match=r"not readable as an image \(no such file\)"):
        images.read(records[-1])
    assert not list(images.place.iterdir())
    (folder / "file").touch()
    with pytest.raises(ValueError, match=r"--resized_images .*file: .* is no folder"):
        ResizedImages(folder / "file", folder, 32)


def test_trainings_and_tests_come_out_the_same(scripts, base, run, data_root, tmp_path, capsys):
    place = tmp_path / "resized"
    again = tmp_path / "again"
    assert scripts("train", *SMALL, *EPOCHS, "--save_path", again, "--resized_images", place) == 0
    assert capsys.readouterr().err.count("--resized_images: not for Stage 2") == 1
    assert_same_tensors(again, base)
    kept = listing(place)
    assert len(kept) == 20  # the images of the small data set
    loop = ["train_cross_attention", "--dataset", "small", "--device", "cpu", *EPOCHS, "--loops", "2", "--resume", base]
    loop += ["--save_path", tmp_path / "x", "--resized_images", place, "--eval_dataset", "small"]
    assert scripts(*loop) == 0
    assert_same_tensors(tmp_path / "x" / "loop_2.pth", run / "loop_2.pth")
    test = ["test", "--ckpt", run / "loop_2.pth", "--dataset", "small", "--device", "cpu"]
    tables = []
    for number, flags in enumerate(([], ["--resized_images", place])):
        results = tmp_path / f"results {number}"
        assert scripts(*test, "--save_path", results, *flags) == 0
        (path,) = results.rglob("loop_2_small_images.csv")
        tables.append(read_csv(path, ["single_score"]))
    assert tables[0] == tables[1] and listing(place) == kept
