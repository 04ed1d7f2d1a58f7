"""Images and masks to tensors, with AA-CLIP's augmentation or a smoother one."""

import math

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from dataset.images import at_model_size

AUGMENTATIONS = ("published", "smooth")


class Transform:
    """PIL image and mask -> normalised pixels [3, S, S] and mask [1, S, S] of 0 and 1.

    What is drawn in augmentation (`augments`) comes from PyTorch's global generator.

    `stage` None: no augmentation. "text": rotation, translation and flips of image and mask together. "image": these,
    after brightness, contrast and saturation jitter.

    `augment` "published": pixels are moved by the nearest neighbour, what moves in from outside is CLIP's mean colour
    and no defect, and the jitter acts on the full-size image. "smooth": pixels are moved bilinearly, what moves in is
    the reflected image with its reflected mask (it shows real surface, so a defect in it is one), and the jitter acts
    on the resized image.
    """

    def __init__(self, img_size: int, stage: str | None = None, augment: str = "published"):
        self.img_size, self.augments = img_size, stage is not None
        self.resize_first = augment == "smooth"
        # Whether an image that was resized before comes out the same; resizing it again leaves it as it is.
        self.takes_resized = self.resize_first or stage != "image"
        self.jitter = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(**{kind: 0.5})], p=0.7)
                for kind in ("brightness", "contrast", "saturation")
            ]
            if stage == "image"
            else [v2.Identity()]
        )
        self.move = v2.Compose(_movements(img_size, augment) if stage else [v2.Identity()])

    def resize(self, image: Image.Image, mask: Image.Image | None) -> tuple[Image.Image, Image.Image | None]:
        """Image and mask at the model's size; what has it already stays as it is."""
        size = (self.img_size, self.img_size)
        mask = mask.resize(size, Image.Resampling.NEAREST) if mask is not None else None
        return at_model_size(image, self.img_size), mask

    def __call__(self, image: Image.Image, mask: Image.Image | None) -> tuple[Tensor, Tensor]:
        if self.resize_first:
            image, mask = self.resize(image, mask)
        image, mask = self.resize(self.jitter(image), mask)
        target = torch.zeros(1, self.img_size, self.img_size)
        if mask is not None:
            target[0] = torch.from_numpy(np.array(mask) != 0)
        # Pixels are normalised before they are moved, so that the fill of 0 is CLIP's mean colour.
        pixels, target = self.move(normalised(v2.functional.to_image(image)), tv_tensors.Mask(target))
        return pixels.as_subclass(Tensor), target.as_subclass(Tensor)


def normalised(pixels: Tensor) -> Tensor:
    """Pixels of 0 to 255, [..., 3, S, S], as CLIP takes them."""
    values = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    return v2.functional.normalize(values, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def to_picture(pixels: Tensor) -> np.ndarray:
    """CLIP's normalised pixels [3, S, S] -> [S, S, 3] in 0..1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def _movements(img_size: int, augment: str) -> list[v2.Transform]:
    """Rotation, translation and flips, each with p 0.5, in the published order."""
    if augment == "smooth":
        # Of a square turned by 30 degrees, up to (cos 30 + sin 30 - 1) / 2 = 0.183 of a side come from outside.
        border = math.ceil(0.19 * img_size)
        around, crop = [v2.Pad(border, padding_mode="reflect")], [v2.CenterCrop(img_size)]
        share, interpolation = 0.15 * img_size / (img_size + 2 * border), InterpolationMode.BILINEAR
    else:
        around, crop, share, interpolation = [], [], 0.15, InterpolationMode.NEAREST
    rotation = v2.RandomRotation(30, interpolation, fill=0)
    translation = v2.RandomAffine(0, translate=(share, share), interpolation=interpolation, fill=0)
    return [
        v2.RandomApply([*around, rotation, *crop], p=0.5),
        v2.RandomApply([*around, translation, *crop], p=0.5),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomVerticalFlip(0.5),
    ]
