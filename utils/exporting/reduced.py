"""Smaller graphs: numbers of float16, or weights of 8 bits; and what is lost by it."""

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from dataset.images import read_record
from dataset.loading import Batch
from dataset.records import Record, few_shot
from dataset.sets import DataSet
from dataset.transforms import Transform
from forward_utils_cross_attention import Prediction
from utils.calibration import Calibration
from utils.exported import CLASS_NUMBER, JUDGED, PIXELS, open_session
from utils.exporting.files import save
from utils.exporting.graph import Judge, to_graph
from utils.judging import Detector
from utils.logs import progress
from utils.testing.metrics import COLUMNS, ClassScores, PixelCounts, find_defects, mean_over_classes

logger = logging.getLogger(__name__)

# Of what is lost: metrics of one image alone, as an exported model judges it.
METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1", "pixel_aupro", "single_auroc", "decision_accuracy")


def as_float16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph computed in float16; what goes in and comes out keeps its type."""
    graph = _copy(graph)
    # The exporter has written all shapes down, and inferring them anew would copy the weights.
    found = onnx_ir.from_proto(convert_float_to_float16(graph, keep_io_types=True, disable_shape_infer=True))
    TopologicalSortPass()(found)  # conversions are put behind what they are for
    return onnx_ir.to_proto(found)


def as_int8(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with products with weights computed in whole numbers of 8 bits, a scale for each column."""
    graph = _copy(graph)
    # It would advise to infer shapes, which the exporter has written down.
    onnx.helper.set_model_props(graph, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "reduced.onnx"
        # Of convolutions there is one, on pixels, in whose place a slower one would come.
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        return onnx.load(path)


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


REDUCED = {"fp16": as_float16, "int8": as_int8}


def loss_of(exactness: str, detector: Detector, data: DataSet, images: int) -> str:
    """A table of what a smaller graph of a detector's model loses on so many images of each kind and class."""
    logger.info("Measuring the loss on %s, %d images of each kind and class.", data.name, images)
    graph = to_graph(Judge(detector, data.descriptions, data.domain))
    with TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("fp32", exactness)}
        save(graph, paths["fp32"])
        save(REDUCED[exactness](graph), paths[exactness])
        sessions = {name: open_session(path) for name, path in paths.items()}
        found = measure(sessions, data, images, detector.calibration)
        del sessions  # which on Windows hold the files
    return loss_table(found, f"{data.name}, {images} images of each kind and class, percent")


def measure(
    sessions: dict[str, Any], data: DataSet, images: int, calibration: Calibration | None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{name of a session: {metric: mean over classes}} on so many images of each kind and class of a data set.

    `seed` draws them. The sessions are of one graph, more or less exact, for the data set's classes in their order.
    """
    records = {name: few_shot(data.of_class(name), 2 * images, seed) for name in data.descriptions}
    values: dict[str, list[dict[str, float]]] = {name: [] for name in sessions}
    with progress(total=sum(map(len, records.values())), desc=f"loss on {data.name}", unit="image") as bar:
        for number, of_class in enumerate(records.values()):
            kept: dict[str, ClassScores] = {}
            for name, found, batch, defects in _judged(sessions, data, of_class, number):
                if name not in kept:
                    pixels = PixelCounts(found.maps.median().item())
                    kept[name] = ClassScores(data.domain, calibration, pixels=pixels)
                kept[name].add(found, batch, [0], [defects], len(kept[name].labels))
                if name == next(iter(sessions)):
                    bar.update()
            for name, scores in kept.items():
                values[name].append(scores.metrics(scores.sample()))
    return {name: mean_over_classes(of_session) for name, of_session in values.items()}


def _judged(
    sessions: dict[str, Any], data: DataSet, records: list[Record], number: int
) -> Iterator[tuple[str, Prediction, Batch, Any]]:
    """Each image of a class, and what each session says of it."""
    for record in records:
        (size,) = {session.get_inputs()[0].shape[1] for session in sessions.values()}
        image, mask = Transform(size).resize(*read_record(data.folder, record))
        defects = find_defects(np.zeros((size, size), bool) if mask is None else np.asarray(mask) != 0)
        labels, masked = torch.tensor([record.label]), torch.tensor([record.has_mask])
        batch = cast(Batch, {"path": [record.image_path], "label": labels, "has_mask": masked})
        given = {PIXELS: np.asarray(image)[None], CLASS_NUMBER: np.array([number], dtype=np.int64)}
        for name, session in sessions.items():
            found = session.run(list(JUDGED), given)
            yield name, Prediction(*map(torch.from_numpy, found)), batch, defects


def loss_table(found: dict[str, dict[str, float]], title: str) -> str:
    """Metrics in percent of the exact graph and of the smaller one, and what the second has less."""
    exact, smaller = found.values()
    rows = {name: [values[metric] for metric in METRICS] for name, values in found.items()}
    rows["loss"] = [exact[metric] - smaller[metric] for metric in METRICS]
    groups, titles = zip(*(COLUMNS[metric] for metric in METRICS), strict=True)
    lines = [title, f"{'':8}" + "".join(f"{group:>10}" for group in groups)]
    lines.append(f"{'':8}" + "".join(f"{title:>10}" for title in titles))
    lines += [f"{name:8}" + "".join(f"{100 * value:10.2f}" for value in row) for name, row in rows.items()]
    return "\n".join(lines)
