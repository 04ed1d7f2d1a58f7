"""What each prompt of a model looked at in one photograph, and what its cross-attentions looked at."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.constants import NORMAL_PROMPTS, class_prompts
from dataset.transforms import Transform
from forward_utils_cross_attention import encode
from model.adapter_cross_attention import Gated
from utils.judging import Detector
from utils.page.judge import coloured, thumbnail
from utils.report.pictures import attention_weights, prompts_on_patches
from utils.report.plots import ATTENTION_COLOURS, DIFFERENCE_COLOURS


@dataclass(frozen=True)
class Look:
    """Maps [n, h, w] on one scale, which of `signed` ones lies around 0; `unit` is what their values are."""

    title: str
    sentence: str
    unit: str
    words: list[str]
    maps: np.ndarray
    signed: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The values that the scale goes between."""
        if self.signed:
            most = float(np.abs(self.maps).max())
            return -most, most
        return float(self.maps.min()), float(self.maps.max())

    @property
    def colours(self) -> str:
        """The scale, by Matplotlib's name."""
        return DIFFERENCE_COLOURS if self.signed else ATTENTION_COLOURS

    def tiles(self, size: tuple[int, int]) -> list[tuple[str, str]]:
        """(word, picture of `size` as a data URL) of each map."""
        pictures = [coloured(values, self.ends, self.colours, size) for values in self.maps]
        return list(zip(self.words, pictures, strict=True))


def look(detector: Detector, path: Path) -> tuple[Image.Image, list[Look]]:
    """A photograph at the size of a page, and what a model of one class looked at in it.

    Raises ValueError where the file is not readable as an image.
    """
    image = detector.read(path)
    (class_name,) = detector.text.bank.index
    pixels = Transform(detector.img_size)(image, None)[0][None]
    weights, grid = attention_weights(detector, pixels, class_name), detector.model.backbone.grid
    prompts = class_prompts(detector.text.bank.descriptions[class_name])
    if detector.model.prompts_see_image:
        looks = [attention_of_prompts(detector, weights["text_cross_attn"], prompts)]
    else:
        looks = [cosines_of_prompts(detector, pixels, class_name, prompts)]
    for name, module in detector.model.cross_attentions().items():
        if isinstance(module, Gated) and module.gate.any():  # those of a base are closed
            looks.append(of_levels(name, weights[name].unflatten(1, (grid, grid)).numpy()))
    return thumbnail(image), looks


def attention_of_prompts(detector: Detector, weights: Tensor, prompts: list[str]) -> Look:
    """With --cross_attn block."""
    backbone = detector.model.backbone
    lengths = [len(backbone.token_texts(prompt)) for prompt in prompts]
    maps, shares = prompts_on_patches(weights, lengths, backbone.grid)
    words = [f"{prompt} CLS {share:.2f}" for prompt, share in zip(prompts, shares, strict=True)]
    sentence = "Brighter: the prompt looks there more. CLS: what it gives to the token of the whole image."
    return Look("Each prompt", sentence, "attention (1: as much as to any patch)", words, maps)


@torch.no_grad()
def cosines_of_prompts(detector: Detector, pixels: Tensor, class_name: str, prompts: list[str]) -> Look:
    """Of pixels [1, 3, S, S], for a text side that sees no image: each prompt beside V1..V4."""
    model, bank = detector.model, detector.text.bank
    patches = encode(model, pixels.to(model.backbone.device), [class_name], detector.text).patches
    embeddings = F.normalize(model.text(bank.select(bank.prompts, bank.numbers([class_name]))).float(), dim=-1)[0]
    cosines = torch.stack([embeddings @ level[0].float().T for level in patches]).mean(dim=0)  # P N
    maps = cosines.unflatten(1, (model.backbone.grid, model.backbone.grid)).cpu().numpy()
    highest = maps.max(axis=(1, 2))
    nearest = highest[:NORMAL_PROMPTS].argmax(), highest[NORMAL_PROMPTS:].argmax() + NORMAL_PROMPTS
    found = " and ".join(f"“{prompts[number]}” ({highest[number]:.2f})" for number in nearest)
    sentence = (
        f"Brighter: more like the prompt. The first {NORMAL_PROMPTS} prompts say normal, the others abnormal, and the "
        f"anomaly map is made of their difference. The nearest to any patch are {found}."
    )
    return Look("Each prompt", sentence, "cosine of prompt and patch, mean of four levels", prompts, maps)


def of_levels(name: str, maps: np.ndarray) -> Look:
    """What a cross-attention in the joint space sees, [levels, h, w]."""
    words = [f"V{number}" for number in range(1, 1 + len(maps))]
    if name == "text_cross_attn":
        sentence = "Brighter: the patch has more of its like in the photograph, which makes it more normal."
        return Look("Text cross-attention", sentence, "cosine with the patches most like it", words, maps)
    sentence = "Red: what the detection feature takes from a patch as abnormal. Blue: what it gives away as normal."
    return Look("Image cross-attention", sentence, "share of the patch (negative: given)", words, maps, signed=True)
