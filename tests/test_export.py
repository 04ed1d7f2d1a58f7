"""Exported models: they say what PyTorch says, without it."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from benchmarks.exported import make_judge, noise
from dataset.images import read_image
from model.config import REPOSITORY
from predict import Detector
from tests.conftest import Scripts
from utils.checkpoints import load_checkpoint
from utils.exported import CLASS_NUMBER, JUDGED, PIXELS, load_exported, open_session
from utils.exporting import files
from utils.exporting.files import data_files
from utils.exporting.graph import Judge, to_graph
from utils.exporting.reduced import as_float16
from utils.judging import load_detectors
from utils.models import ModelLoader

CLASSES = ("metal nut", "candle")


def export(scripts: Scripts, *words: object) -> int:
    return scripts("export", *words)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run, data_root) -> Path:
    """The second loop of a run, for two classes."""
    path = tmp_path_factory.mktemp("exported") / "both.onnx"
    words = ["--ckpt", run / "loop_2.pth", "--class_name", *CLASSES, "--out", path]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert export(Scripts(monkeypatch, data_root), *words) == 0
    return path


@pytest.fixture
def images(data_root) -> Path:
    return data_root / "small" / "candle"


# what a file holds


def compare(judge: Judge, path: Path, given: list[np.ndarray]) -> None:
    """A file says what PyTorch says of batches of any size."""
    session = open_session(path)
    names = [value.name for value in session.get_inputs()]
    for batch in (1, 7):
        parts = dict(zip(names, (values[:batch] for values in given), strict=True))
        expected = [values.numpy() for values in judge(*map(torch.from_numpy, parts.values()))]
        found = session.run(None, parts)
        assert np.abs(found[0] - expected[0]).max() <= 1e-4 * np.ptp(expected[0])
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert np.allclose(one, other, atol=1e-4)
        (alone,) = session.run([JUDGED[0]], {name: values[-1:] for name, values in parts.items()})
        assert np.abs(found[0][-1:] - alone).max() <= 1e-4 * np.ptp(alone)  # no image looks at another


def test_a_file_says_what_pytorch_says(exported, run):
    loader = ModelLoader(torch.device("cpu"))
    (detector,) = load_detectors([load_checkpoint(run / "loop_2.pth")], CLASSES, "industrial", loader, "fp32")
    judge = Judge(detector, detector.text.bank.descriptions, "industrial")
    compare(judge, exported, [noise(7, 64), np.arange(7, dtype=np.int64) % 2])


def test_cross_attention_after_block_0_is_in_the_graph_too(backbone, tmp_path):
    judge = make_judge(backbone, "block")
    files.save(to_graph(judge), tmp_path / "block.onnx")
    compare(judge, tmp_path / "block.onnx", [noise(7, 64)])


def test_all_that_comes_out_is_what_a_detector_says(exported, run, images):
    session = open_session(exported)
    trained = Detector.load(run / "loop_2.pth", class_name="candle", device="cpu")
    verdict = trained(images / "1_0.png")
    pixels = np.asarray(read_image(images / "1_0.png").resize((64, 64), 3))[None]
    names = [output.name for output in session.get_outputs()]
    found = dict(
        zip(names, session.run(names, {PIXELS: pixels, CLASS_NUMBER: np.array([1], dtype=np.int64)}), strict=True)
    )
    assert names == ["anomaly_map", "detection_score", "single_score", "probability", "decision"]
    assert found["detection_score"][0] == pytest.approx(verdict.detection_score, abs=1e-5)
    assert found["single_score"][0] == pytest.approx(verdict.single_score, abs=1e-5)
    assert found["probability"][0] == pytest.approx(verdict.probability, abs=1e-4)
    assert found["decision"].dtype == bool and found["decision"][0] == verdict.anomalous


def test_a_file_tells_what_it_is(exported, run, backbone):
    onnx.checker.check_model(exported, full_check=True)
    graph = onnx.load(exported)
    assert graph.opset_import[0].version == 20
    said = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert said["classes"] == list(CLASSES) and said["domain"] == "industrial" and said["img_size"] == 64
    assert len(said["prompts"]["candle"]) == 16 and "a photo of a damaged candle." in said["prompts"]["candle"]
    assert said["threshold"] == said["calibration"]["threshold"] and said["clip_sha256"] == backbone.sha256
    assert (
        said["checkpoint"] == "loop_2.pth"
        and list(said["checkpoint_sha256"]) == ["loop_2.pth"]
        and len(said["checkpoint_sha256"]["loop_2.pth"]) == 64
    )
    content = exported.read_bytes()  # of the machine that wrote it, it says nothing
    assert str(REPOSITORY).encode() not in content and str(run.parent).encode() not in content


def test_weights_that_are_too_large_for_one_file_lie_beside_it(exported, tmp_path, monkeypatch):
    graph, about = onnx.load(exported), load_exported([exported], "candle")[0].about
    monkeypatch.setattr(files, "MOST_BYTES", 1_000_000)
    out = tmp_path / "large.onnx"
    written, checked = files.write_graph(graph, about, out, lambda file: file.parent)
    assert checked != tmp_path and not checked.exists()
    assert [path.suffix for path in written] == [".onnx", ".data"] and out.stat().st_size < 1_000_000
    pixels = {PIXELS: noise(1, 64), CLASS_NUMBER: np.zeros(1, dtype=np.int64)}
    (found,), (expected,) = (open_session(path).run([JUDGED[0]], pixels) for path in (out, exported))
    assert np.array_equal(found, expected)
    largest = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = bytes(len(largest.raw_data))
    again, _ = files.write_graph(graph, about, out, data_files)
    assert again != written and sorted(tmp_path.iterdir()) == sorted(again)  # the old weights went with the old graph
    again[1].unlink()
    with pytest.raises(ValueError, match=r"large\.onnx: not readable as an exported model"):
        open_session(out)


def test_half_precision_changes_little(exported, tmp_path):
    files.save(as_float16(onnx.load(exported)), tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * exported.stat().st_size
    given = {PIXELS: noise(2, 64), CLASS_NUMBER: np.arange(2, dtype=np.int64)}
    exact, half = (open_session(path).run([JUDGED[0]], given)[0] for path in (exported, tmp_path / "half.onnx"))
    assert 0 < np.abs(exact - half).max() < 0.02 * np.ptp(exact) and half.dtype == np.float32


def test_a_smaller_file_says_what_it_loses(scripts, run, exported, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("export")
    monkeypatch.setattr(module, "LOSS_DATA", "small")
    monkeypatch.setattr(module, "prepare", lambda name, root: None)
    for place in ("graph", "reduced"):  # the graph is known: tracing takes most of the time
        monkeypatch.setattr(f"utils.exporting.{place}.to_graph", lambda judge: onnx.load(exported))
    out = tmp_path / "small.onnx"
    words = ["--ckpt", run / "loop_2.pth", "--out", out, "--class_name", *CLASSES, "--quantize", "int8"]
    assert export(scripts, *words, "--loss_images", "2") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("small, 2 images of each kind and class")
    exact, smaller, loss = ([float(word) for word in line.split()[1:]] for line in shown[-3:])
    assert loss == pytest.approx([a - b for a, b in zip(exact, smaller, strict=True)], abs=0.011)
    assert max(map(abs, loss)) < 15 and out.stat().st_size < 6_000_000
    given = {PIXELS: noise(2, 64), CLASS_NUMBER: np.arange(2, dtype=np.int64)}
    assert open_session(out).run(None, given)[0].dtype == np.float32


# predict.py


def table_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predict_says_the_same_of_a_trained_model_and_of_its_file(scripts, exported, run, images, tmp_path):
    words = ["--ckpt", run / "loop_2.pth", exported, "--class_name", "candle", "--images", images]
    assert scripts("predict", *words, "--device", "cpu", "--regions", "--save_path", tmp_path) == 0
    rows = table_of(tmp_path)
    assert {row["model"] for row in rows} == {"x/loop_2", "both.onnx"}
    for trained, other in zip(rows[::2], rows[1::2], strict=True):
        assert trained["image"] == other["image"] and trained["decision"] == other["decision"]
        for name in ("single_score", "probability", "highest_map_value"):
            assert float(trained[name]) == pytest.approx(float(other[name]), abs=1e-3)
        assert np.allclose(np.load(tmp_path / trained["map"]), np.load(tmp_path / other["map"]), atol=1e-3)
    regions = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"))
    assert [len(record["regions"]) for record in regions[::2]] == [len(record["regions"]) for record in regions[1::2]]


def test_a_file_is_judged_by_where_there_is_no_pytorch(exported, images, tmp_path):
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'torchvision', 'open_clip', 'sklearn'))\n"  # which makes importing fail
        "import runpy\n"
        f"sys.argv = {['predict.py', '--ckpt', str(exported), '--class_name', 'candle', '--images', str(images)]!r}\n"
        f"sys.argv += ['--save_path', {str(tmp_path / 'out')!r}]\n"
        "runpy.run_path('predict.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    judged = len(list(images.glob("*.png")))
    assert len(table_of(tmp_path / "out")) == len(list((tmp_path / "out").glob("*.png"))) == judged


def test_a_trained_model_takes_the_class_of_the_file_beside_it(scripts, run, exported, images, tmp_path, monkeypatch):
    of_one = load_exported([exported], "candle")  # as a file of one class, whose name need not be given
    monkeypatch.setattr("predict.load_exported", lambda paths, class_name, *how: of_one)
    words = ["--ckpt", run / "loop_2.pth", exported, "--images", images / "1_0.png", "--save_path", tmp_path]
    assert scripts("predict", *words, "--device", "cpu") == 0
    trained, other = (float(row["single_score"]) for row in table_of(tmp_path))
    assert trained == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "without --class_name: {path} was exported for metal nut, candle"),
        (["--class_name", "bolt"], "--class_name bolt: {path} was exported for metal nut, candle"),
        (
            ["--class_name", "candle", "--domain", "medical"],
            "--domain medical: {path} was exported for industrial images",
        ),
        (
            ["--class_name", "candle", "--precision", "bf16"],
            "--precision: goes with checkpoints",
        ),
        (["--class_name", "candle", "--img_size", "96"], "--img_size: goes with checkpoints"),
        (["--class_name", "candle", "--normal_images", "good"], "--normal_images: goes with checkpoints"),
        (["--class_name", "candle", "--device", "tpu"], "--device tpu: an exported model runs on cpu or cuda"),
        (["--class_name", "candle", "--device", "cuda"], "this onnxruntime has no CUDAExecutionProvider"),
    ],
)
def test_what_a_file_was_not_exported_for_is_refused(scripts, exported, images, tmp_path, capsys, words, expected):
    out = tmp_path / "out"
    assert scripts("predict", "--ckpt", exported, "--images", images, *words, "--save_path", out) == 2
    err = capsys.readouterr().err
    assert expected.format(path=exported) in err and err.count("error:") == 1 and not out.exists()


def test_files_of_other_kinds_are_refused(scripts, exported, images, tmp_path, capsys):
    graph = onnx.load(exported)
    strangers = {"gone": None, "garbage": b"no graph", "cut": exported.read_bytes()[:1000]}
    del graph.metadata_props[:]
    strangers["other"] = graph.SerializeToString()
    onnx.helper.set_model_props(graph, {"format": "2"})
    strangers["newer"] = graph.SerializeToString()
    onnx.helper.set_model_props(graph, {"format": "1", "calibration": '{"threshold": 0.5}'})
    strangers["short"] = graph.SerializeToString()
    expected = {"gone": "no such file", "newer": "exported in format 2; this version reads 1"}
    expected |= dict.fromkeys(("other", "short"), "not exported by this program")
    for name, content in strangers.items():
        path = tmp_path / f"{name}.onnx"
        if content is not None:
            path.write_bytes(content)
        words = ["--ckpt", path, "--images", images, "--save_path", tmp_path / "out"]
        assert scripts("predict", *words) == 2
        assert expected.get(name, "not readable as an exported model") in capsys.readouterr().err


# export.py


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "bolt.pt"], "expected a name that ends with .onnx"),
        (["--out", "a.onnx", "--class_name", "nut", "nut"], "--class_name nut: is named twice"),
        (["--out", "a.onnx", "--quantize", "int8", "--precision", "fp16"], "goes with --precision fp32 alone"),
        (["--out", "notes.onnx"], "is there already, and was not written by export.py"),
        (["--out", "notes.onnx/a.onnx"], "is no folder"),
        (["--out", "a.onnx", "--class_name", "word " * 80], "A prompt has"),
    ],
)
def test_a_call_that_cannot_be_meant_writes_nothing(scripts, run, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.onnx").write_text("mine", encoding="utf-8")
    assert export(scripts, "--ckpt", run / "loop_2.pth", *words) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.onnx"]


def test_a_run_is_exported_loop_by_loop(scripts, run, tmp_path, capsys):
    assert export(scripts, "--ckpt", run, "--out", tmp_path / "a.onnx") == 2
    assert "a run of 3 loops. Name one of its files" in capsys.readouterr().err


def test_a_missing_library_is_named(scripts, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("export.find_spec", lambda name: None if name == "onnxscript" else name)
    assert export(scripts, "--ckpt", run / "loop_2.pth", "--out", tmp_path / "a.onnx") == 2
    assert "export.py needs onnxscript. Install: pip install -r requirements/onnx.txt" in capsys.readouterr().err


def test_what_is_not_finite_or_differs_replaces_no_file(scripts, run, exported, tmp_path, monkeypatch, capsys):
    out = tmp_path / "kept.onnx"
    out.write_bytes(exported.read_bytes())
    monkeypatch.setattr("utils.exporting.graph.to_graph", lambda judge: onnx.load(exported))
    words = ["--ckpt", run / "loop_0.pth", "--class_name", *CLASSES, "--out", out]
    assert export(scripts, *words) == 2  # the graph is that of another loop
    assert "maps differ from PyTorch's by" in capsys.readouterr().err
    graph = onnx.load(exported)
    for tensor in graph.graph.initializer:
        if tensor.name.endswith("positional_embedding"):
            tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()
    monkeypatch.setattr("utils.exporting.graph.to_graph", lambda judge: graph)
    assert export(scripts, *words) == 2
    assert "maps or scores are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.onnx"]
    assert out.read_bytes() == exported.read_bytes()
