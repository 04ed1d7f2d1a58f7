"""Drawing products: colours, the sheet that a product is drawn on, shapes and noise.

Shapes are in units: the product fills about -1..1 in both directions, and its pose maps units to pixels.
"""

import math

import cv2
import numpy as np
from numpy.typing import ArrayLike

PALETTE = {
    "red": (200, 45, 45),
    "orange": (232, 135, 40),
    "yellow": (228, 205, 70),
    "green": (55, 150, 75),
    "blue": (55, 95, 195),
    "purple": (130, 70, 165),
    "pink": (230, 150, 175),
    "brown": (130, 85, 50),
    "gray": (140, 143, 148),
    "white": (228, 226, 220),
    "black": (48, 48, 52),
}
SUBPIXEL_BITS = 4


def fixed_point(pixels: np.ndarray) -> np.ndarray:
    """Coordinates in pixels as OpenCV's drawing functions take them with `shift=SUBPIXEL_BITS`."""
    return np.round(pixels * 2**SUBPIXEL_BITS).astype(np.int32)


class Sheet:
    """A product in the making: `albedo` [S, S, 3] and `alpha` [S, S], uint8, drawn on in units through a pose."""

    def __init__(self, size: int, rng: np.random.Generator, colour: tuple[int, int, int], upright: bool = False):
        self.size, self.rng, self.colour = size, rng, np.array(colour, dtype=np.float32)
        self.albedo = np.empty((size, size, 3), dtype=np.uint8)
        self.albedo[:] = colour
        self.alpha = np.zeros((size, size), dtype=np.uint8)
        angle = rng.normal(0, 0.15) if upright else rng.uniform(0, 2 * math.pi)
        self.scale = size * rng.uniform(0.36, 0.46)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self.linear = self.scale * turn * rng.uniform(0.92, 1.08, size=(1, 2))
        self.offset = size * (0.5 + rng.uniform(-0.05, 0.05, size=2))

    def shade(self, factor: float) -> tuple[float, ...]:
        """The product's colour, darker or lighter."""
        return tuple(np.clip(self.colour * factor, 0, 255).tolist())

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 2] in units -> fixed-point pixels of OpenCV."""
        return fixed_point(points @ self.linear.T + self.offset)

    def fill(self, points: ArrayLike, colour: tuple[float, ...], body: bool = False) -> None:
        """A filled polygon; with `body` it is part of the product's outline."""
        corners = [self.pixels(np.asarray(points))]
        cv2.fillPoly(self.albedo, corners, colour, cv2.LINE_AA, SUBPIXEL_BITS)
        if body:
            cv2.fillPoly(self.alpha, corners, 255, cv2.LINE_AA, SUBPIXEL_BITS)

    def cut(self, points: ArrayLike) -> None:
        """A polygon that is no part of the product: what lies behind shows."""
        cv2.fillPoly(self.alpha, [self.pixels(np.asarray(points))], 0, cv2.LINE_AA, SUBPIXEL_BITS)

    def line(self, points: ArrayLike, width: float, colour: tuple[float, ...], body: bool = False) -> None:
        """An open polyline of `width` units."""
        corners, thickness = [self.pixels(np.asarray(points))], max(1, round(width * self.scale))
        cv2.polylines(self.albedo, corners, False, colour, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
        if body:
            cv2.polylines(self.alpha, corners, False, 255, thickness, cv2.LINE_AA, SUBPIXEL_BITS)

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of every pixel in units, two of [S, S]."""
        axis = np.arange(self.size, dtype=np.float32)
        inverse = np.linalg.inv(self.linear).astype(np.float32)
        x, y = axis[None, :] - np.float32(self.offset[0]), axis[:, None] - np.float32(self.offset[1])
        return inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y

    def cover(self, brightness: np.ndarray) -> None:
        """A texture over the whole image: the colour x `brightness` [S, S]."""
        self.albedo[:] = np.clip(brightness[..., None] * self.colour, 0, 255)
        self.alpha[:] = 255


def circle(radius: float, centre: tuple[float, float] = (0, 0), squash: float = 1.0) -> np.ndarray:
    """An ellipse of half axes `radius` and `radius * squash`."""
    angles = np.linspace(0, 2 * math.pi, 36, endpoint=False)
    return np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * squash * np.sin(angles)], axis=1)


def regular(corners: int, radius: float) -> np.ndarray:
    """A regular polygon."""
    angles = np.arange(corners) * 2 * math.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """A rectangle."""
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=float)


def toothed(teeth: int, inner: float, outer: float) -> np.ndarray:
    """A wheel with square teeth."""
    angles = np.arange(4 * teeth) * 2 * math.pi / (4 * teeth)
    radii = np.tile([inner, outer, outer, inner], teeth)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def blob(rng: np.random.Generator, radius: float, rough: float = 0.25) -> np.ndarray:
    """An irregular closed outline around the origin."""
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    waves = sum(rng.normal(0, rough / k) * np.cos(k * angles + rng.uniform(0, 6.3)) for k in (2, 3, 5))
    radii = radius * np.clip(1 + waves, 0.4, 1.7)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise of about `cells` bumps across, [S, S], mean 0, about -1..1."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32) * 0.6
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def blend(image: np.ndarray, colour: np.ndarray | np.float32, weight: np.ndarray) -> None:
    """Move `image` [S, S, 3] towards `colour` (grey, a colour or an image), by `weight` [S, S] in 0..1, in place."""
    image += (colour - image) * weight[..., None]


def shifted(field: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """`field` moved by (dx, dy) pixels, borders repeated."""
    move = np.array([[1, 0, dx], [0, 1, dy]], dtype=np.float32)
    return cv2.warpAffine(field, move, field.shape[::-1], borderMode=cv2.BORDER_REPLICATE)


def direction(rng: np.random.Generator) -> np.ndarray:
    """A random unit vector."""
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.cos(angle), math.sin(angle)])
