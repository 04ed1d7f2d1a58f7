"""Our model as one of anomalib's, so that its `Engine`, data sets, metrics and visualisers run it.

    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from bridges.anomalib import CrossAttentionAAClip

    engine = Engine(default_root_dir="predictions/anomalib")
    engine.test(CrossAttentionAAClip("ckpt/RUN/loop_3.pth"), datamodule=MVTecAD(category="bottle"))

What an image gets here is what `utils.judging.Detector` gives it: docs/anomalib.md compares both programs.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from dataset.constants import describe_class
from dataset.sets import canonical_name
from forward_utils_cross_attention import PromptBank
from utils.arguments import PRECISION
from utils.judging import Detector

try:
    from anomalib import LearningType
    from anomalib.data import ImageBatch, InferenceBatch
    from anomalib.metrics import Evaluator
    from anomalib.models.components import AnomalibModule
    from anomalib.post_processing import PostProcessor
    from anomalib.pre_processing import PreProcessor
    from anomalib.visualization import Visualizer
except ImportError as error:
    raise ImportError(
        f"bridges.anomalib takes anomalib 2.7.0 or newer ({error}). Install: pip install -r requirements/anomalib.txt"
    ) from error

logger = logging.getLogger(__name__)


class PillowResize(v2.Resize):
    """Images [..., 3, h, w] of 0..1 and masks [..., h, w] at a size, bit by bit as `Transform` of ours resizes files.

    torchvision's bicubic on tensors neither rounds to 8 bits nor cuts what goes beyond 0..1, and its masks lie up to
    half a pixel off. Of a size already, both stay as they are: anomalib resizes images in the data set and once more
    as a batch. A `Resize` to anomalib, which looks for one.
    """

    def __init__(self, size: int):
        super().__init__((size, size), InterpolationMode.BICUBIC)

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """One image, mask or batch of them; torchvision's hook, which names the arguments."""
        if list(inpt.shape[-2:]) == list(self.size):
            return inpt
        if isinstance(inpt, tv_tensors.Mask):
            planes = inpt.as_subclass(Tensor).to(torch.uint8).reshape(-1, 1, *inpt.shape[-2:])
            found = self._resized(planes, Image.Resampling.NEAREST).to(inpt.dtype)
        else:
            levels = functional.to_dtype(inpt.as_subclass(Tensor).clamp(0, 1), torch.uint8, scale=True)
            planes = levels.reshape(-1, 3, *inpt.shape[-2:])
            found = functional.to_dtype(self._resized(planes, Image.Resampling.BICUBIC), torch.float32, scale=True)
        return tv_tensors.wrap(found.reshape(*inpt.shape[:-2], *self.size).to(inpt.device), like=inpt)

    def _resized(self, planes: Tensor, resample: Image.Resampling) -> Tensor:
        """Pictures [n, 1 or 3, h, w] of 8 bits -> [n, 1 or 3, S, S], on the CPU."""
        pictures = (functional.to_pil_image(plane).resize(self.size, resample) for plane in planes)
        return torch.stack([functional.pil_to_tensor(picture) for picture in pictures])


class ModelPreProcessor(PreProcessor):
    """Resizes and normalises for a model of `size` px; the model tells it, so Lightning's checkpoints do not."""

    def __init__(self, size: int):
        super().__init__(v2.Compose([PillowResize(size), v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)]))

    def checkpoint_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Nothing is read."""


class JudgingModel(nn.Module):
    """A detector's model as anomalib calls one: normalised pixels [B, 3, S, S] -> scores [B] and maps [B, S, S]."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.model, self.detector = detector.model, detector
        self._device = detector.model.backbone.device

    @property
    def description(self) -> str:
        """What all images show, in the words of the prompts."""
        (description,) = self.detector.text.bank.descriptions.values()
        return description

    def show(self, description: str) -> None:
        """Take prompts that name something else, encoded where the model is."""
        self._device = self.model.backbone.device
        bank = PromptBank(self.model.backbone, {description: description}, self.detector.text.bank.domain)
        self.detector = Detector.of(self.model, bank, self.detector.calibration, self.detector.precision)

    def forward(self, images: Tensor, paths: list[str] | None = None) -> InferenceBatch:
        """Single-image scores and maps. Raises ValueError that names an image whose map or score is not finite."""
        if self._device != self.model.backbone.device:  # encoded prompts stay where they were
            self.show(self.description)
        paths = paths or [f"image {number} of a batch" for number in range(1, len(images) + 1)]
        found = self.detector.predict(images, list(self.detector.text.bank.index) * len(images), paths)
        return InferenceBatch(pred_score=found.single_scores, anomaly_map=found.maps)


class CrossAttentionAAClip(AnomalibModule):
    """AA-CLIP with cross-attention, trained by this program, as a zero-shot model of anomalib.

    `ckpt` is a loop file or the folder of a base; `class_name`, `domain`, `precision`, `clip_weights`, `model_name` and
    `img_size` are as predict.py's flags. Without `class_name` the prompts name the category of the datamodule, as
    `dataset.constants` describes it, else "object". The `Engine` chooses the device. `pred_score` is the single-image
    score, `anomaly_map` the map, as `Detector` gives them; anomalib's `PostProcessor` then scales both, and decides.

    Raises FileNotFoundError or ValueError that say what was expected.
    """

    model: JudgingModel

    def __init__(
        self,
        ckpt: str | Path,
        class_name: str | None = None,
        domain: str = "industrial",
        precision: str = "fp32",
        clip_weights: str | Path | None = None,
        model_name: str | None = None,
        img_size: int | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ):
        if precision not in PRECISION["choices"]:
            raise ValueError(f"precision '{precision}': expected {' or '.join(PRECISION['choices'])}.")
        detector = Detector.load(
            ckpt,
            class_name or "object",
            domain,
            device="cpu",  # from which Lightning moves it
            precision=precision,
            clip_weights=clip_weights,
            model_name=model_name,
            img_size=img_size,
        )
        if pre_processor is True:
            pre_processor = ModelPreProcessor(detector.model.backbone.img_size)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.class_name = class_name
        self.model = JudgingModel(detector)

    def setup(self, stage: str) -> None:
        """Take the name for the prompts: the given one, else that of the datamodule's category, else the last one."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        category = getattr(datamodule, "category", None)
        if category and not self.class_name:
            description, _ = describe_class(canonical_name(datamodule.name), category)
            self.model.show(description)
        logger.info("The prompts say '%s' (class_name).", self.model.description)

    def on_predict_start(self) -> None:
        """Warn where the post-processor has no statistics to scale and decide by."""
        seen = getattr(self.post_processor, "image_min", None)
        if seen is not None and seen.isnan():
            logger.warning(
                "No images of validation: scores and maps are as the model gives them, and pred_label and pred_mask "
                "mean nothing. Validate or test this model on a datamodule before."
            )

    def val_dataloader(self) -> list:
        """Nothing where there is no datamodule, so that `Engine.predict` takes a folder; earlier statistics hold."""
        return []

    def validation_step(self, batch: ImageBatch, *_: Any, **__: Any) -> ImageBatch:  # type: ignore[override]
        """Fill in scores [B] and maps [B, S, S]; testing and predicting do the same."""
        return batch.update(**self.model(batch.image, batch.image_path)._asdict())

    test_step = predict_step = validation_step  # type: ignore[assignment]

    def configure_optimizers(self) -> None:
        """None: nothing trains here."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """None that the model needs."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """Zero-shot: `Engine.fit` only validates, for the statistics of the post-processor."""
        return LearningType.ZERO_SHOT

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """anomalib's own, as of all its zero-shot models: scales and decides by the images of validation."""
        return PostProcessor()
