"""Eight kinds of defect: each changes an image in place and returns how much of each pixel it took, [S, S] in 0..1."""

from typing import NamedTuple

import cv2
import numpy as np

from dataset.demo.drawing import PALETTE, SUBPIXEL_BITS, Sheet, blend, blob, direction, fixed_point, noise, shifted

# Share of the image that a defect covers.
DEFECT_AREA = (0.01, 0.12)
TRIES = 200


class Site(NamedTuple):
    """Where a defect goes: `centre` in pixels and its `reach` (about half its extent) in pixels.

    Of the scene: `inside` [S, S], 1 on the product; `light` [2], the direction it comes from; `under` [S, S, 3], what
    lies behind the product.
    """

    rng: np.random.Generator
    size: int
    centre: np.ndarray
    reach: float
    inside: np.ndarray
    light: np.ndarray
    under: np.ndarray

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 2] in units of the reach around the centre -> fixed-point pixels."""
        return fixed_point(points * self.reach + self.centre)

    def outline(self, points: np.ndarray) -> np.ndarray:
        """A filled outline around the centre, [S, S] in 0..1, points in units of the reach."""
        layer = np.zeros((self.size, self.size), dtype=np.uint8)
        cv2.fillPoly(layer, [self.pixels(points)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
        return layer.astype(np.float32) / 255

    def stroke(self, paths: list[np.ndarray], width: float) -> np.ndarray:
        """Open lines, `width` in pixels of a 128 px image."""
        layer = np.zeros((self.size, self.size), dtype=np.uint8)
        thickness = max(1, round(width * self.size / 128))
        cv2.polylines(layer, [self.pixels(path) for path in paths], False, 255, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
        return layer.astype(np.float32) / 255

    def contrast(self, image: np.ndarray) -> np.float32:
        """A grey well apart from that of the surroundings, darker or brighter."""
        x, y = self.centre.astype(int)
        around = float(image[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9].mean())
        dark = around > 170 or (around > 85 and self.rng.random() < 0.5)
        step = self.rng.uniform(65, 120)
        return np.float32(max(around - step, 8) if dark else min(around + step, 250))

    def tint(self, image: np.ndarray) -> np.ndarray:
        """A named colour, or its opposite where it is close to the product's own and would not show."""
        colour = np.array(PALETTE[self.rng.choice(list(PALETTE))], dtype=np.float32)
        x, y = self.centre.astype(int)
        return 255 - colour if np.abs(image[y, x] - colour).max() < 70 else colour

    def rim(self, taken: np.ndarray) -> np.ndarray:
        """What lies around `taken`, on the product."""
        return np.clip(cv2.dilate(taken, np.ones((3, 3), np.uint8)) - taken, 0, 1) * self.inside


def scratch(image: np.ndarray, site: Site) -> np.ndarray:
    along = direction(site.rng)
    across = np.array([-along[1], along[0]])
    t = np.linspace(-1.6, 1.6, 8)[:, None]
    paths = [
        t * along + (0.12 * t**2 * site.rng.normal() + gap) * across for gap in (0, 0.2)[: site.rng.integers(1, 3)]
    ]
    taken = site.stroke(paths, site.rng.uniform(2, 3.4)) * site.inside
    blend(image, site.contrast(image), 0.85 * taken)
    return taken


def crack(image: np.ndarray, site: Site) -> np.ndarray:
    along = direction(site.rng)
    steps = np.cumsum(along * 0.3 + site.rng.normal(0, 0.22, size=(11, 2)), axis=0)
    path = steps - steps.mean(axis=0)
    fork = path[5] + np.cumsum(along[::-1] * (0.2, -0.2) + site.rng.normal(0, 0.18, size=(5, 2)), axis=0)
    taken = site.stroke([path, np.concatenate([path[5:6], fork])], site.rng.uniform(2, 3.6)) * site.inside
    blend(image, np.float32(site.rng.uniform(5, 30)), 0.9 * taken)
    return taken


def hole(image: np.ndarray, site: Site) -> np.ndarray:
    taken = site.outline(blob(site.rng, 0.75, 0.1)) * site.inside
    blend(image, np.float32(230), 0.5 * site.rim(taken))
    blend(image, np.float32(site.rng.uniform(5, 35)), taken)
    return taken


def stain(image: np.ndarray, site: Site) -> np.ndarray:
    shape = cv2.GaussianBlur(site.outline(blob(site.rng, 1.0, 0.35)), (0, 0), site.size / 110) * site.inside
    blend(image, site.tint(image), site.rng.uniform(0.55, 0.85) * shape)
    return shape


def missing_piece(image: np.ndarray, site: Site) -> np.ndarray:
    taken = site.outline(blob(site.rng, 1.05, 0.3)) * site.inside
    blend(image, site.under, taken)
    blend(image, np.float32(25), 0.6 * site.rim(taken))
    return taken


def contamination(image: np.ndarray, site: Site) -> np.ndarray:
    taken = np.zeros((site.size, site.size), dtype=np.float32)
    for spot in site.rng.normal(0, 0.55, size=(int(site.rng.integers(6, 13)), 2)):
        np.maximum(taken, site.outline(blob(site.rng, site.rng.uniform(0.18, 0.38)) + spot), out=taken)
    colour = site.contrast(image) + site.rng.normal(0, 30, 3).astype(np.float32)
    grain = 1 + 0.25 * noise(site.rng, site.size, site.size // 3)
    blend(image, np.clip(grain[..., None] * colour, 0, 255), 0.92 * taken)
    return taken


def thread(image: np.ndarray, site: Site) -> np.ndarray:
    along = direction(site.rng)
    across = np.array([-along[1], along[0]])
    t = np.linspace(-1.5, 1.5, 24)[:, None]
    path = t * along + 0.5 * np.sin(site.rng.uniform(1.5, 3.5) * t + site.rng.uniform(0, 6.3)) * across
    taken = site.stroke([path], site.rng.uniform(2.2, 3.6))
    image *= 1 - 0.35 * shifted(taken, *(-0.02 * site.size * site.light))[..., None]
    blend(image, site.tint(image), taken)
    return taken


def dent(image: np.ndarray, site: Site) -> np.ndarray:
    axis = np.arange(site.size, dtype=np.float32)
    x = (axis[None] - site.centre[0]) / (1.15 * site.reach)
    y = (axis[:, None] - site.centre[1]) / (site.reach * site.rng.uniform(0.7, 1.15))
    radius = x**2 + y**2
    slope = (x * site.light[0] + y * site.light[1]) * np.maximum(1 - radius, 0) ** 2
    image *= np.clip(1 + site.rng.uniform(3, 4.5) * slope * site.inside, 0.2, 2.2)[..., None].astype(np.float32)
    return (radius < 0.85).astype(np.float32) * site.inside


DEFECTS = {
    "scratch": scratch,
    "crack": crack,
    "hole": hole,
    "stain": stain,
    "missing piece": missing_piece,
    "contamination": contamination,
    "thread": thread,
    "dent": dent,
}


def add_defect(
    image: np.ndarray, sheet: Sheet, under: np.ndarray, light: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str]:
    """Damage the product: returns image, mask (0 or 255) and kind; the mask covers 1 to 12 % of the image.

    Thin products leave little room for some kinds, so kind, place and size are drawn until the area fits.
    """
    rng, size = sheet.rng, sheet.size
    inside = sheet.alpha.astype(np.float32) / 255
    rows, columns = np.nonzero(sheet.alpha[size // 8 : -size // 8, size // 8 : -size // 8] > 200)
    for _ in range(TRIES):
        kind = str(rng.choice(list(DEFECTS)))
        place = rng.integers(len(rows))
        centre = np.array([columns[place], rows[place]], dtype=float) + size // 8
        damaged = image.copy()
        site = Site(rng, size, centre, size * rng.uniform(0.12, 0.22), inside, light, under)
        mask = DEFECTS[kind](damaged, site) > 0.35
        if DEFECT_AREA[0] <= mask.mean() <= DEFECT_AREA[1]:
            return damaged, mask.astype(np.uint8) * 255, kind
    raise RuntimeError(f"No defect that covers {DEFECT_AREA} of the image in {TRIES} tries; is the product too small?")
