"""The 36 products and textures: each function draws one on a sheet."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dataset.demo.drawing import PALETTE, Sheet, blob, box, circle, noise, regular, toothed

METALS = ("gray", "gray", "yellow", "brown", "black", "white", "blue", "red")


def bolt(s: Sheet) -> None:
    half = s.rng.uniform(0.22, 0.3)
    s.fill(box(-0.5, -half, 1, half), s.shade(1), body=True)
    s.fill(box(-1, -0.58, -0.48, 0.58), s.shade(1.12), body=True)
    s.fill(box(-1, -0.2, -0.48, 0.2), s.shade(1.25))
    for x in np.arange(0.0, 1.0, s.rng.uniform(0.11, 0.16)):
        s.line([[x, -half], [x + 0.06, half]], 0.045, s.shade(0.55))


def gear(s: Sheet) -> None:
    s.fill(toothed(int(s.rng.integers(9, 15)), 0.78, 1.0), s.shade(1), body=True)
    s.fill(circle(0.62), s.shade(0.82))
    s.fill(circle(0.42), s.shade(1.1))
    s.cut(circle(s.rng.uniform(0.16, 0.24)))


def coin(s: Sheet) -> None:
    s.fill(circle(1), s.shade(1.1), body=True)
    s.fill(circle(0.84), s.shade(0.85))
    s.fill(circle(0.8), s.shade(1))
    star = regular(10, 0.5) * np.tile([1, 0.45], 5)[:, None]
    s.fill(star if s.rng.random() < 0.5 else blob(s.rng, 0.42, 0.3), s.shade(1.3))


def pill(s: Sheet) -> None:
    squash = s.rng.uniform(0.6, 1)
    s.fill(circle(0.95, squash=squash), s.shade(1), body=True)
    s.fill(circle(0.8, squash=squash), s.shade(1.06))
    s.line([[0, -0.75 * squash], [0, 0.75 * squash]], 0.07, s.shade(0.72))


def candle(s: Sheet) -> None:
    half = s.rng.uniform(0.42, 0.6)
    s.line([[0, -0.4], [0.02, -0.78]], 0.06, (45, 38, 35), body=True)
    s.fill(circle(0.14, (0.02, -0.82), 1.6), (255, 205, 90), body=True)
    s.fill(box(-half, -0.5, half, 1), s.shade(1), body=True)
    s.fill(circle(half, (0, -0.5), 0.22), s.shade(1.2), body=True)


def circuit_board(s: Sheet) -> None:
    s.fill(box(-1, -0.8, 1, 0.8), s.shade(1), body=True)
    for _ in range(8):
        x, y, turn = s.rng.uniform(-0.9, 0.9), s.rng.uniform(-0.7, 0.7), s.rng.uniform(-0.9, 0.9)
        s.line([[x, y], [turn, y], [turn, s.rng.uniform(-0.7, 0.7)]], 0.04, s.shade(1.45))
    for x, y in s.rng.uniform((-0.75, -0.55), (0.75, 0.55), size=(4, 2)):
        s.fill(box(x - 0.18, y - 0.13, x + 0.18, y + 0.13), (38, 38, 42))
    for x, y in s.rng.uniform((-0.9, -0.7), (0.9, 0.7), size=(7, 2)):
        s.fill(circle(0.06, (x, y)), (215, 190, 110))


def cable(s: Sheet) -> None:
    t = np.linspace(-1.3, 1.3, 24)
    for shift in (-0.52, 0, 0.52):
        bend = shift + 0.14 * np.sin(2 * t + s.rng.uniform(0, 6.3))
        path = np.stack([t, bend], axis=1)
        s.line(path, 0.46, s.shade(0.75), body=True)
        s.line(path, 0.32, s.shade(1.05))
        s.line(path - (0, 0.06), 0.08, s.shade(1.35))


def button(s: Sheet) -> None:
    s.fill(circle(1), s.shade(1.1), body=True)
    s.fill(circle(0.8), s.shade(0.8))
    s.fill(circle(0.73), s.shade(1))
    for angle in np.arange(4 if s.rng.random() < 0.7 else 2) * math.pi / 2 + math.pi / 4:
        s.cut(circle(0.12, (0.27 * math.cos(angle), 0.27 * math.sin(angle))))


def nut(s: Sheet) -> None:
    s.fill(regular(6, 1), s.shade(1), body=True)
    s.fill(circle(0.76), s.shade(1.15))
    s.fill(circle(0.56), s.shade(0.65))
    s.cut(circle(s.rng.uniform(0.4, 0.48)))


def capsule(s: Sheet) -> None:
    s.line([[-0.6, 0], [0.6, 0]], 0.84, s.shade(1), body=True)
    other = s.shade(1.5) if s.colour.mean() < 120 else (238, 234, 226)
    s.line([[-0.6, 0], [-0.25, 0]], 0.84, other)
    s.fill(box(-0.22, -0.45, 0.02, 0.45), s.shade(1))
    s.line([[-0.02, -0.4], [-0.02, 0.4]], 0.04, s.shade(0.6))


def chip(s: Sheet) -> None:
    for y in np.linspace(-0.62, 0.62, int(s.rng.integers(5, 8))):
        s.fill(box(-1, y - 0.06, 1, y + 0.06), (196, 198, 202), body=True)
    s.fill(box(-0.74, -0.8, 0.74, 0.8), s.shade(0.9), body=True)
    s.fill(box(-0.66, -0.72, 0.66, 0.72), s.shade(1.05))
    s.fill(circle(0.09, (-0.5, -0.56)), s.shade(0.5))


def bottle_top(s: Sheet) -> None:
    s.fill(toothed(21, 0.92, 1.0), s.shade(0.85), body=True)
    s.fill(circle(0.8), s.shade(1))
    s.fill(circle(0.62), s.shade(1.25))
    s.fill(circle(0.56), s.shade(1.0))


def key(s: Sheet) -> None:
    s.fill(box(-0.4, -0.17, 1.05, 0.17), s.shade(1), body=True)
    s.fill(circle(0.56, (-0.62, 0)), s.shade(1.08), body=True)
    for x in np.arange(0.25, 1.0, 0.24):
        s.fill(box(x, 0.1, x + 0.14, 0.2 + s.rng.uniform(0.05, 0.25)), s.shade(1), body=True)
    s.line([[-0.1, -0.03], [1, -0.03]], 0.06, s.shade(0.7))
    s.cut(circle(0.2, (-0.75, 0)))


def cookie(s: Sheet) -> None:
    s.fill(blob(s.rng, 0.95, 0.07), s.shade(1), body=True)
    s.fill(blob(s.rng, 0.78, 0.08), s.shade(1.12))
    for radius, angle in zip(np.sqrt(s.rng.uniform(0.02, 0.6, 11)), s.rng.uniform(0, 6.3, 11), strict=True):
        centre = radius * np.array([math.cos(angle), math.sin(angle)])
        s.fill(blob(s.rng, 0.1) + centre, s.shade(0.35))


def battery(s: Sheet) -> None:
    s.fill(box(0.88, -0.16, 1.04, 0.16), (190, 190, 194), body=True)
    s.fill(box(-1, -0.46, 0.9, 0.46), s.shade(1), body=True)
    s.fill(box(0.42, -0.46, 0.9, 0.46), (205, 160, 80))
    s.fill(box(-1, -0.46, -0.9, 0.46), (185, 185, 188))
    s.line([[0.66, -0.12], [0.66, 0.12]], 0.06, (40, 40, 40))
    s.line([[0.54, 0], [0.78, 0]], 0.06, (40, 40, 40))


def spring(s: Sheet) -> None:
    turns = int(s.rng.integers(4, 6))
    t = np.linspace(0, 1, 12 * turns)
    path = np.stack([-0.9 + 1.8 * t, 0.58 * np.cos(2 * math.pi * turns * t)], axis=1)
    s.line(path, 0.28, s.shade(0.8), body=True)
    s.line(path, 0.16, s.shade(1.15))


def wood(s: Sheet) -> None:
    u, v = s.grid()
    warp = noise(s.rng, s.size, 5)
    rings = np.sin(s.rng.uniform(9, 16) * v + 1.6 * warp + 0.4 * u)
    planks = np.abs(((v + s.rng.uniform(0, 1)) % 0.9) - 0.45) > 0.425
    s.cover((1 + 0.17 * rings + 0.08 * noise(s.rng, s.size, 40)) * np.where(planks, 0.6, 1))


def leather(s: Sheet) -> None:
    cells = np.abs(noise(s.rng, s.size, 22)) + 0.5 * np.abs(noise(s.rng, s.size, 40))
    s.cover(0.72 + 0.45 * np.minimum(cells, 0.9))


def fabric(s: Sheet) -> None:
    u, v = s.grid()
    count = s.rng.uniform(20, 30)
    warp, weft = np.sin(count * u), np.sin(count * v)
    s.cover(0.85 + 0.28 * np.where(np.sin(count / 2 * (u + v)) > 0, warp, weft) + 0.08 * noise(s.rng, s.size, 12))


def tile(s: Sheet) -> None:
    u, v = s.grid()
    side = s.rng.uniform(0.75, 1.0)
    a, b = (u / side + s.rng.random()) % 1, (v / side + s.rng.random()) % 1
    grout = np.minimum(np.minimum(a, 1 - a), np.minimum(b, 1 - b)) < 0.045
    s.cover(np.where(grout, 0.5, 1 + 0.07 * noise(s.rng, s.size, 6) + 0.1 * (a - b)))


def mesh(s: Sheet) -> None:
    u, v = s.grid()
    count = s.rng.uniform(9, 13)
    wires = np.maximum(np.cos(count * u), np.cos(count * v))
    s.cover(np.clip(0.35 + 1.6 * (wires - 0.55), 0.22, 1.15) + 0.04 * noise(s.rng, s.size, 30))


def carpet(s: Sheet) -> None:
    tufts = 0.32 * noise(s.rng, s.size, 46) + 0.2 * noise(s.rng, s.size, 64)
    s.cover(0.85 + tufts + 0.12 * noise(s.rng, s.size, 8))


def marble(s: Sheet) -> None:
    u, v = s.grid()
    warp = 2.2 * noise(s.rng, s.size, 4) + 0.8 * noise(s.rng, s.size, 10)
    veins = np.abs(np.sin(s.rng.uniform(1.5, 2.6) * (u + 0.4 * v) + warp))
    s.cover(0.68 + 0.42 * np.sqrt(veins) + 0.05 * noise(s.rng, s.size, 20))


def cork(s: Sheet) -> None:
    grains, pores = noise(s.rng, s.size, 20), noise(s.rng, s.size, 34)
    s.cover(np.where(pores > 0.65, 0.5, 0.9 + 0.22 * np.sign(grains) * np.minimum(np.abs(grains), 0.8)))


def bearing(s: Sheet) -> None:
    s.fill(circle(1), s.shade(1.1), body=True)
    s.fill(circle(0.84), s.shade(0.5))
    for angle in np.arange(count := int(s.rng.integers(8, 12))) * 2 * math.pi / count:
        s.fill(circle(0.16, (0.66 * math.cos(angle), 0.66 * math.sin(angle))), s.shade(1.3))
    s.fill(circle(0.48), s.shade(1))
    s.cut(circle(s.rng.uniform(0.26, 0.34)))


def ruler(s: Sheet) -> None:
    half = s.rng.uniform(0.2, 0.3)
    s.fill(box(-1.05, -half, 1.05, half), s.shade(1), body=True)
    ink = s.shade(0.35) if s.colour.mean() > 110 else (225, 225, 222)
    for number, x in enumerate(np.linspace(-0.95, 0.95, 27)):
        s.line([[x, -half], [x, -half + (0.2 if number % 5 == 0 else 0.11)]], 0.03, ink)
    s.line([[-0.95, 0.6 * half], [0.95, 0.6 * half]], 0.03, s.shade(0.8))


def comb(s: Sheet) -> None:
    for x in np.linspace(-0.92, 0.92, int(s.rng.integers(13, 18))):
        s.line([[x, -0.2], [x, s.rng.uniform(0.5, 0.54)]], 0.07, s.shade(0.92), body=True)
    s.fill(box(-1.02, -0.52, 1.02, -0.16), s.shade(1), body=True)
    s.line([[-0.9, -0.34], [0.9, -0.34]], 0.05, s.shade(1.25))


def zipper(s: Sheet) -> None:
    s.fill(box(-1.1, -0.42, 1.1, 0.42), s.shade(1), body=True)
    for y in (-0.3, 0.3):
        s.line([[-1.1, y], [1.1, y]], 0.03, s.shade(0.7))
    for number, x in enumerate(np.arange(-1.06, 1.06, 0.085)):
        shift = 0.05 if number % 2 else -0.05
        s.fill(box(x, shift - 0.09, x + 0.055, shift + 0.09), (196, 190, 172))
    x = s.rng.uniform(-0.5, 0.5)
    s.fill(box(x - 0.14, -0.17, x + 0.14, 0.17), (168, 168, 172))
    s.line([[x, 0], [x + 0.42, 0]], 0.1, (140, 140, 146))


def plate(s: Sheet) -> None:
    s.fill(circle(1, squash=0.97), s.shade(1), body=True)
    s.fill(circle(0.7), s.shade(0.88))
    s.fill(circle(0.66), s.shade(1.08))
    for angle in np.arange(count := int(s.rng.integers(12, 19))) * 2 * math.pi / count:
        s.fill(circle(0.05, (0.85 * math.cos(angle), 0.85 * math.sin(angle))), s.shade(0.6))


def propeller(s: Sheet) -> None:
    blades, twist = int(s.rng.integers(3, 5)), s.rng.uniform(0.15, 0.3)
    outline = np.array([[0.1, -0.1], [0.5, -0.3], [0.95, -0.2], [1.05, 0.02], [0.6, 0.12], [0.1, 0.1]])
    for angle in np.arange(blades) * 2 * math.pi / blades:
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        s.fill(outline @ turn, s.shade(1), body=True)
        s.line(np.array([[0.2, -0.03], [0.9, -twist / 3]]) @ turn, 0.06, s.shade(1.25))
    s.fill(circle(0.26), s.shade(0.8), body=True)
    s.fill(circle(0.14), s.shade(1.2))


def padlock(s: Sheet) -> None:
    t = np.linspace(math.pi, 2 * math.pi, 16)
    arch = np.stack([0.42 * np.cos(t), -0.25 + 0.62 * np.sin(t)], axis=1)
    s.line(np.concatenate([[[-0.42, 0.1]], arch, [[0.42, 0.1]]]), 0.17, (172, 174, 180), body=True)
    s.fill(box(-0.72, -0.05, 0.72, 0.95), s.shade(1), body=True)
    s.fill(box(-0.62, 0.05, 0.62, 0.85), s.shade(1.12))
    s.fill(circle(0.11, (0, 0.36)), (36, 36, 40))
    s.line([[0, 0.38], [0, 0.62]], 0.08, (36, 36, 40))


def plug(s: Sheet) -> None:
    for y in (-0.3, 0.3):
        s.fill(box(-1.0, y - 0.08, -0.3, y + 0.08), (200, 196, 184), body=True)
    s.fill(box(-0.45, -0.62, 0.35, 0.62), s.shade(1), body=True)
    s.fill(box(-0.45, -0.62, -0.32, 0.62), s.shade(1.25))
    for x in np.arange(0.0, 0.32, 0.1):
        s.line([[x, -0.5], [x, 0.5]], 0.035, s.shade(0.65))
    s.line([[0.3, 0], [1.15, s.rng.uniform(-0.25, 0.25)]], 0.26, s.shade(0.85), body=True)


def brick(s: Sheet) -> None:
    u, v = s.grid()
    height = s.rng.uniform(0.36, 0.5)
    row = np.floor(v / height)
    a, b = (u / (2.1 * height) + 0.5 * (row % 2)) % 1, (v / height) % 1
    mortar = (np.minimum(a, 1 - a) < 0.03) | (np.minimum(b, 1 - b) < 0.07)
    tone = 1 + 0.12 * np.sin(37 * row + 17 * np.floor(u / (2.1 * height) + 0.5 * (row % 2)))
    s.cover(np.where(mortar, 1.4, tone + 0.1 * noise(s.rng, s.size, 30)))


def gravel(s: Sheet) -> None:
    stones = noise(s.rng, s.size, 15)
    edges = np.minimum(np.abs(stones), np.abs(noise(s.rng, s.size, 13)))
    s.cover(np.where(edges < 0.07, 0.5, 0.95 + 0.25 * np.clip(stones, -1, 1)) + 0.06 * noise(s.rng, s.size, 50))


def bamboo(s: Sheet) -> None:
    u, v = s.grid()
    width = s.rng.uniform(0.2, 0.3)
    stick = np.floor(v / width)
    across = (v / width) % 1
    along = (u / 1.1 + 0.37 * stick) % 1
    rounded = 0.6 + 1.9 * across * (1 - across)
    s.cover(np.where(along < 0.045, 0.6, 1) * rounded + 0.05 * noise(s.rng, s.size, 26))


def denim(s: Sheet) -> None:
    u, v = s.grid()
    count = s.rng.uniform(26, 36)
    twill = np.sin(count * (u + 0.6 * v))
    s.cover(0.85 + 0.2 * twill + 0.14 * noise(s.rng, s.size, 44) + 0.08 * noise(s.rng, s.size, 5))


class Product(NamedTuple):
    """How a product looks: `draw` puts it on a sheet in one of `colours` (one named twice is twice as likely).

    A `texture` fills the image; `upright` products hardly turn.
    """

    draw: Callable[[Sheet], None]
    colours: tuple[str, ...]
    texture: bool = False
    upright: bool = False


ANY = tuple(PALETTE)
PAINTED = tuple(name for name in PALETTE if name not in ("black", "white"))
PRODUCTS = {
    "bolt": Product(bolt, METALS),
    "gear": Product(gear, METALS),
    "coin": Product(coin, ("gray", "yellow", "brown", "orange")),
    "pill": Product(pill, ("white", "pink", "yellow", "orange", "blue", "green", "red")),
    "candle": Product(candle, ANY, upright=True),
    "circuit_board": Product(circuit_board, ("green", "green", "blue", "red", "black", "purple")),
    "cable": Product(cable, ANY),
    "button": Product(button, ANY),
    "wood": Product(wood, ("brown", "brown", "orange", "yellow", "gray"), texture=True),
    "leather": Product(leather, ("brown", "brown", "black", "red", "white", "blue", "green"), texture=True),
    "fabric": Product(fabric, PAINTED, texture=True),
    "tile": Product(tile, ("white", "gray", "blue", "green", "pink", "brown", "yellow"), texture=True),
    "nut": Product(nut, METALS),
    "capsule": Product(capsule, PAINTED),
    "chip": Product(chip, ("black", "black", "gray", "blue", "green")),
    "bottle_top": Product(bottle_top, ANY),
    "key": Product(key, METALS),
    "cookie": Product(cookie, ("brown", "orange", "yellow", "pink")),
    "battery": Product(battery, ("black", "green", "red", "blue", "purple", "gray")),
    "spring": Product(spring, METALS),
    "mesh": Product(mesh, ("gray", "yellow", "white", "green", "blue"), texture=True),
    "carpet": Product(carpet, PAINTED, texture=True),
    "marble": Product(marble, ("white", "gray", "green", "pink", "yellow"), texture=True),
    "cork": Product(cork, ("brown", "orange", "yellow"), texture=True),
    "bearing": Product(bearing, METALS),
    "ruler": Product(ruler, ("yellow", "brown", "white", "gray", "pink", "green")),
    "comb": Product(comb, ANY),
    "zipper": Product(zipper, PAINTED),
    "plate": Product(plate, ("white", "white", "gray", "blue", "yellow", "pink", "green")),
    "propeller": Product(propeller, METALS),
    "padlock": Product(padlock, ("yellow", "yellow", "gray", "black", "red", "blue", "green"), upright=True),
    "plug": Product(plug, ("black", "white", "gray", "orange", "brown")),
    "brick": Product(brick, ("red", "brown", "brown", "orange", "gray"), texture=True),
    "gravel": Product(gravel, ("gray", "gray", "brown", "white", "black"), texture=True),
    "bamboo": Product(bamboo, ("yellow", "brown", "green", "orange"), texture=True),
    "denim": Product(denim, ("blue", "blue", "black", "gray", "purple"), texture=True),
}
