"""A trained model as an ONNX graph: pixels -> anomaly map, scores, probability, decision.

    pixels [B, S, S, 3] uint8, red first; with several classes class_number [B] int64
      -> anomaly_map [B, S, S], detection_score [B], single_score [B], and, where there is a calibration,
         probability [B], decision [B] (bool)

B is free. Both cross-attentions are in the graph, image by image; of the text, what depends on the class alone is a
constant.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from dataset.transforms import normalised
from forward_utils_cross_attention import ClassText, PromptBank, predict
from model.adapter import Prompts
from utils.exported import CLASS_NUMBER, DECIDED, JUDGED, PIXELS, open_session
from utils.judging import Detector

# Of ONNX's operators; the first version with GELU among them.
OPSET = 20
# Images at least, beside one alone, that are compared with PyTorch.
COMPARED = 3


class NumberedBank(PromptBank):
    """A bank that is asked for classes by their numbers, in a tensor [B]: a graph knows no names."""

    def numbers(self, class_names: Any) -> Any:
        return class_names

    def select(self, prompts: Prompts, numbers: Any) -> Prompts:
        index = torch.as_tensor(numbers, device=prompts.eot.device)
        return Prompts(prompts.tokens[index], prompts.eot[index], max(self.totals))


class Judge(nn.Module):
    """All from pixels to a decision, by the model of a detector; `descriptions` and `domain` as in `PromptBank`."""

    def __init__(self, detector: Detector, descriptions: dict[str, str], domain: str):
        super().__init__()
        self.model, self.calibration = detector.model, detector.calibration
        self.text = ClassText(self.model, NumberedBank(self.model.backbone, descriptions, domain), fixed=True)
        # What is kept of the classes is computed now, or it would be part of the graph.
        first = torch.zeros(1, dtype=torch.int64, device=self.model.backbone.device)
        self.text.contexts(first)  # type: ignore[arg-type]
        if not self.model.prompts_see_image:
            self.text.anchors(first, None)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor, class_number: Tensor | None = None) -> tuple[Tensor, ...]:
        if class_number is None:
            class_number = torch.zeros_like(pixels[:, 0, 0, 0], dtype=torch.int64)
        images = normalised(pixels.permute(0, 3, 1, 2))
        found = predict(self.model, images, class_number, self.text)  # type: ignore[arg-type]
        if self.calibration is None:
            return tuple(found)
        fitted = self.calibration
        logits = fitted.intercept + fitted.detection_weight * found.detection_scores
        probability = (logits + fitted.map_weight * found.maps.amax(dim=(1, 2))).sigmoid()
        return *found, probability, probability >= fitted.threshold


def to_graph(judge: Judge) -> onnx.ModelProto:
    """The graph of a judge, with its weights."""
    size, several = judge.model.backbone.img_size, len(judge.text.bank.index) > 1
    given: dict[str, Tensor] = {PIXELS: torch.zeros(2, size, size, 3, dtype=torch.uint8)}
    if several:
        given[CLASS_NUMBER] = torch.zeros(2, dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1)
    outputs = JUDGED if judge.calibration is None else (*JUDGED, *DECIDED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of axes, and of what is deprecated within PyTorch
        program: Any = torch.onnx.export(
            judge.eval(),
            kwargs=given,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(given),
            output_names=list(outputs),
            dynamic_shapes={name: {0: batch} for name in given},
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(program.model)  # which tell of each node from which line of which file it came
    graph: onnx.ModelProto = program.model_proto
    for value in (*graph.graph.input, *graph.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(f"{value.name}: the batch is not free in the graph.")
    return graph


def check_difference(judge: Judge, path: Path, most: float | None) -> float:
    """How much a file's maps differ from PyTorch's at most, in shares of their range, on images of noise.

    Raises ValueError where anything that comes out is not finite, or maps differ by more than `most`.
    """
    session, rng = open_session(path), np.random.default_rng(0)
    size, classes, largest = judge.model.backbone.img_size, len(judge.text.bank.index), 0.0
    for count in (1, max(COMPARED, classes)):
        given: dict[str, np.ndarray] = {PIXELS: rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)}
        if classes > 1:
            given[CLASS_NUMBER] = np.arange(count, dtype=np.int64) % classes
        expected, found = judge(*map(torch.from_numpy, given.values())), session.run(None, given)
        if not all(np.isfinite(values).all() for values in found):
            raise ValueError(f"{path.name}: maps or scores are not finite. Nothing was written; try --precision fp32.")
        maps = expected[0].numpy()
        largest = max(largest, float(np.abs(found[0] - maps).max() / np.ptp(maps)))
    if most is not None and largest > most:
        raise ValueError(
            f"{path.name}: maps differ from PyTorch's by {largest:.1e} of their range, expected at most {most:.0e}. "
            "Nothing was written; another version of onnxscript or onnxruntime may do better."
        )
    return largest
