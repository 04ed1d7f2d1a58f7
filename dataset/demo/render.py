"""One image of a product: pose, colour, light, shadow, background, harmless marks, and a defect if wanted.

Intact and damaged products are drawn alike, marks included. An image depends on its seed alone (and on the versions of
NumPy and OpenCV, which may change how they draw).
"""

from typing import NamedTuple

import cv2
import numpy as np

from dataset.demo.defects import add_defect
from dataset.demo.drawing import PALETTE, Sheet, blend, direction, noise, shifted
from dataset.demo.products import PRODUCTS

IMAGE_SIZE = 128


class Rendered(NamedTuple):
    """`image` [S, S, 3] RGB and `mask` [S, S] (0 or 255), uint8; `colour` of the product; `defect` kind or None."""

    image: np.ndarray
    mask: np.ndarray
    colour: str
    defect: str | None


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """What a product lies on, [S, S, 3] float32 in 0..255: plain, cloudy, striped or grained, under uneven light."""
    colour = np.float32(rng.uniform(40, 225)) + rng.normal(0, 14, 3).astype(np.float32)
    pattern = rng.integers(4)
    field = 0.10 * noise(rng, size, 3)
    if pattern == 1:
        field += 0.10 * noise(rng, size, 12)
    elif pattern == 2:
        axis = np.arange(size, dtype=np.float32) / size
        stripes = np.sin(rng.uniform(20, 50) * (axis[:, None] * rng.normal() + axis[None] * rng.normal()))
        field += 0.06 * stripes
    elif pattern == 3:
        field += 0.07 * noise(rng, size, size // 3)
    return (1 + field)[..., None] * colour


def lit(sheet: Sheet, light: np.ndarray, texture: bool) -> np.ndarray:
    """The product's colours under a light from direction `light`: rounded edges for objects, a slope for textures."""
    size = sheet.size
    if texture:
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        shade = 1 + 0.13 * (axis[None] * light[0] + axis[:, None] * light[1])
    else:
        depth = cv2.distanceTransform((sheet.alpha > 127).astype(np.uint8), cv2.DIST_L2, 3)
        height = cv2.GaussianBlur(np.minimum(depth, 0.08 * size), (0, 0), size / 90)
        slope = cv2.Scharr(height, cv2.CV_32F, 1, 0) * light[0] + cv2.Scharr(height, cv2.CV_32F, 0, 1) * light[1]
        shade = np.clip(1 - 0.022 * slope, 0.45, 1.5)
    return sheet.albedo * shade[..., None].astype(np.float32)


def add_marks(image: np.ndarray, sheet: Sheet) -> None:
    """Print, highlights and dust, each on some of the images."""
    rng, size = sheet.rng, sheet.size
    inside = sheet.alpha.astype(np.float32) / 255
    if rng.random() < 0.3:
        layer = np.zeros((size, size), dtype=np.uint8)
        text = "".join(rng.choice(list("ABCDEFHKLMNPRSTUXZ0123456789"), size=int(rng.integers(2, 5))))
        place = (int(size * rng.uniform(0.25, 0.5)), int(size * rng.uniform(0.4, 0.65)))
        cv2.putText(
            layer, text, place, cv2.FONT_HERSHEY_SIMPLEX, size / 128 * rng.uniform(0.4, 0.65), 255, 1, cv2.LINE_AA
        )
        tone = np.float32(30 if sheet.colour.mean() > 110 else 225)
        blend(image, tone, layer.astype(np.float32) / 255 * inside * 0.8)
    if rng.random() < 0.5:
        layer = np.zeros((size, size), dtype=np.float32)
        centre = tuple(int(c) for c in rng.uniform(0.3, 0.7, 2) * size)
        axes = (int(size * rng.uniform(0.06, 0.16)), int(size * rng.uniform(0.02, 0.06)))
        cv2.ellipse(layer, centre, axes, float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(0.2, 0.5)), -1)
        blend(image, np.float32(255), cv2.GaussianBlur(layer, (0, 0), size / 36) * inside)
    if rng.random() < 0.5:
        spots = rng.integers(0, size, size=(int(rng.integers(4, 18)), 2))
        image[spots[:, 0], spots[:, 1]] += rng.uniform(-55, 55, size=(len(spots), 1)).astype(np.float32)


def render(category: str, damaged: bool, seed: tuple[int, ...], size: int = IMAGE_SIZE) -> Rendered:
    """One image of `category`, intact or damaged, `size` x `size` pixels; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    product = PRODUCTS[category]
    colour_name = str(rng.choice(product.colours))
    colour = np.clip(np.array(PALETTE[colour_name]) * rng.uniform(0.85, 1.12) + rng.normal(0, 7, 3), 12, 245)
    sheet = Sheet(size, rng, tuple(colour.tolist()), product.upright)
    product.draw(sheet)

    light = direction(rng).astype(np.float32)
    under = background(rng, size)
    if product.texture:
        under *= np.float32(0.35)
    else:
        shadow = cv2.GaussianBlur(sheet.alpha, (0, 0), size / 40).astype(np.float32) / 255
        distance = size * rng.uniform(0.02, 0.06)
        under *= 1 - rng.uniform(0.25, 0.6) * shifted(shadow, *(-distance * light))[..., None].astype(np.float32)
    image = under.copy()
    blend(image, lit(sheet, light, product.texture), sheet.alpha.astype(np.float32) / 255)
    add_marks(image, sheet)

    mask, kind = np.zeros((size, size), dtype=np.uint8), None
    if damaged:
        image, mask, kind = add_defect(image, sheet, under, light)
    image *= np.float32(rng.uniform(0.8, 1.15))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), size / 128 * rng.uniform(0.5, 0.9))
    image += rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(rng.uniform(1, 6))
    return Rendered(np.clip(image, 0, 255).astype(np.uint8), mask, colour_name, kind)
