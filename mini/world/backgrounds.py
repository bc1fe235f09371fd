"""Procedural backgrounds, each with the phrases by which a caption calls it.

A background is rendered from value noise, gradients and a few shapes, differently for every seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.floating]  # [size, size, 3] in 0..1, where nothing else is said
Colour = tuple[float, float, float]  # RGB in 0..1


@dataclass(frozen=True)
class Background:
    """A kind of background.

    Args:
        name: One word for it.
        phrases: Phrases for it in captions, as in ``a dog {phrase}``; the first is used where one is enough.
        render: Function ``(size, rng) -> pixels``, which renders it with pixels of shape [size, size, 3] in 0..1.
    """

    name: str
    phrases: tuple[str, ...]
    render: Callable[[int, np.random.Generator], Array]


def _noise(size: int, rng: np.random.Generator, across: int, down: int | None = None) -> Array:
    """Make smooth value noise [size, size, 1] in 0..1, with ``across`` (and ``down``) features along an edge."""
    grid = rng.random((down or across, across), dtype=np.float32)
    smooth = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth), 0, 1)[..., None]


def _gradient(size: int, top: Colour, bottom: Colour) -> Array:
    """Fade from one colour at the top to another at the bottom."""
    weight = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    column = np.asarray(top, np.float32) * (1 - weight) + np.asarray(bottom, np.float32) * weight
    return np.repeat(column, size, axis=1)


def _below_horizon(ground: Array, sky: Array, rng: np.random.Generator) -> Array:
    """Put ground under a sky; the horizon lies a quarter to two fifths from the top."""
    size = len(ground)
    horizon = int(size * rng.uniform(0.25, 0.4))
    return np.concatenate([sky[:horizon], ground[horizon:]])


def _day_sky(size: int, rng: np.random.Generator) -> Array:
    clouds = np.clip(_noise(size, rng, 4, 8) * 2 - 1, 0, 1)
    return _gradient(size, (0.35, 0.62, 0.92), (0.78, 0.9, 0.98)) * (1 - 0.7 * clouds) + 0.7 * clouds


def _grass(size: int, rng: np.random.Generator) -> Array:
    blades = _noise(size, rng, 64, 16)
    patches = _noise(size, rng, 5)
    dark, light = np.asarray((0.13, 0.42, 0.1), np.float32), np.asarray((0.5, 0.76, 0.25), np.float32)
    ground = dark + (light - dark) * (0.65 * blades + 0.35 * patches)
    return _below_horizon(ground, _day_sky(size, rng), rng)


def _snow(size: int, rng: np.random.Generator) -> Array:
    drifts = _noise(size, rng, 3, 10)
    ground = np.asarray((0.8, 0.87, 0.96), np.float32) + 0.2 * drifts
    sky = _gradient(size, (0.62, 0.68, 0.76), (0.82, 0.85, 0.9))
    landscape = _below_horizon(np.clip(ground, 0, 1), sky, rng)
    return _dots(landscape, rng, count=40, radius=0.011, colour=(255, 255, 255))


def _sand(size: int, rng: np.random.Generator) -> Array:
    waves = np.sin(np.linspace(0, 60, size, dtype=np.float32)[:, None, None] + 8 * _noise(size, rng, 4))
    ground = np.asarray((0.87, 0.74, 0.47), np.float32) + 0.05 * waves + 0.08 * (_noise(size, rng, 6) - 0.5)
    return _below_horizon(np.clip(ground, 0, 1), _day_sky(size, rng), rng)


def _water(size: int, rng: np.random.Generator) -> Array:
    waves = _noise(size, rng, 6, 28)
    deep, light = np.asarray((0.03, 0.25, 0.55), np.float32), np.asarray((0.3, 0.66, 0.85), np.float32)
    return _below_horizon(deep + (light - deep) * waves**1.5, _day_sky(size, rng), rng)


def _wood(size: int, rng: np.random.Generator) -> Array:
    grain = _noise(size, rng, 3, 48)
    planks = int(rng.integers(3, 6))
    row = np.arange(size) * planks // size
    tone = rng.uniform(-0.06, 0.06, planks).astype(np.float32)[row][:, None, None]
    floor = np.asarray((0.55, 0.34, 0.17), np.float32) + 0.16 * (grain - 0.5) + tone
    gaps = np.flatnonzero(np.diff(row))
    floor[gaps] = floor[gaps] * 0.45
    return np.clip(np.broadcast_to(floor, (size, size, 3)), 0, 1)


def _night(size: int, rng: np.random.Generator) -> Array:
    sky = _dots(_gradient(size, (0.01, 0.02, 0.1), (0.12, 0.13, 0.34)), rng, 45, 0.006, (255, 250, 220))
    centre = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2)
    sky = _disc(sky, centre, 0.06, (246, 240, 205))
    hills = np.broadcast_to(np.asarray((0.03, 0.05, 0.08), np.float32), sky.shape) + 0.03 * _noise(size, rng, 8)
    height = int(size * rng.uniform(0.75, 0.88))
    return np.concatenate([sky[:height], hills[height:]]).astype(np.float32)


def _brick(size: int, rng: np.random.Generator) -> Array:
    rows = int(rng.integers(8, 12))
    height, width = size / rows, 2.2 * size / rows
    wall = Image.new("RGB", (size, size), (196, 186, 174))
    canvas = ImageDraw.Draw(wall)
    gap = max(1, size // 100)
    for row in range(rows + 1):
        left = -width * (0.5 * (row % 2) + rng.uniform(0, 0.05))
        while left < size:
            shade = rng.uniform(0.82, 1.12)
            colour = tuple(int(min(255, channel * shade)) for channel in (168, 74, 54))
            canvas.rectangle(
                (left + gap, row * height + gap, left + width - gap, (row + 1) * height - gap), fill=colour
            )
            left += width
    return np.clip(_to_array(wall) + 0.08 * (_noise(size, rng, 40) - 0.5), 0, 1)


def _sunset(size: int, rng: np.random.Generator) -> Array:
    sky = _gradient(size, (0.36, 0.16, 0.45), (1.0, 0.62, 0.2))
    middle = rng.uniform(0.2, 0.8), rng.uniform(0.55, 0.7)
    sky = _disc(sky, middle, 0.13, (255, 228, 130))
    land = np.asarray((0.2, 0.08, 0.16), np.float32) + 0.06 * _noise(size, rng, 10)
    land = np.broadcast_to(land, sky.shape)
    height = int(size * rng.uniform(0.72, 0.85))
    return np.concatenate([sky[:height], land[height:]]).astype(np.float32)


BACKGROUNDS: tuple[Background, ...] = (
    Background("grass", ("on the grass", "in a meadow"), _grass),
    Background("snow", ("in the snow", "in winter"), _snow),
    Background("sand", ("on the beach", "in the sand"), _sand),
    Background("water", ("in the sea", "in the water"), _water),
    Background("wood", ("on a wooden floor", "on wood"), _wood),
    Background("night", ("at night", "under the stars"), _night),
    Background("brick", ("in front of a brick wall", "by a brick wall"), _brick),
    Background("sunset", ("at sunset", "in the evening sun"), _sunset),
)


def _to_array(image: Image.Image) -> Array:
    return np.asarray(image, np.float32) / 255


def _to_image(pixels: Array) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))


def _dots(pixels: Array, rng: np.random.Generator, count: int, radius: float, colour: tuple[int, int, int]) -> Array:
    """Add small discs at random; ``radius`` is the largest, as a fraction of the edge."""
    size = len(pixels)
    image = _to_image(pixels)
    canvas = ImageDraw.Draw(image)
    for x, y, scale in rng.random((count, 3)):
        r = max(0.5, radius * size * (0.4 + 0.6 * scale))
        canvas.ellipse((x * size - r, y * size - r, x * size + r, y * size + r), fill=colour)
    return _to_array(image)


def _disc(pixels: Array, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]) -> Array:
    size = len(pixels)
    image = _to_image(pixels)
    box = [size * (c + sign * radius) for sign in (-1, 1) for c in centre]
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return _to_array(image)
