"""Places: procedural backgrounds, each with the phrases a caption may call it by.

Every place is drawn from value noise, gradients and a few shapes, a different one for every seed. Pictures are float32
[size, size, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Picture = np.ndarray  # float32 [size, size, 3]


Random = np.random.Generator


@dataclass(frozen=True)
class Place:
    """A kind of background.

    Args:
        name: one word for it.
        phrases: how a caption says it, ``a dog {phrase}``; the first one is used where one is enough.
        paint: ``paint(size, random) -> picture``.
    """

    name: str
    phrases: tuple[str, ...]
    paint: Callable[[int, Random], Picture]


def noise(size: int, random: Random, across: int, down: int | None = None) -> np.ndarray:
    """Smooth value noise [size, size, 1] in 0..1, with ``across`` (and ``down``) features along an edge."""
    grid = random.random((down or across, across), dtype=np.float32)
    smooth = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth), 0, 1)[..., None]


def gradient(size: int, top: tuple[float, float, float], bottom: tuple[float, float, float]) -> Picture:
    """A picture that fades from one colour at the top to another at the bottom."""
    share = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    column = np.asarray(top, np.float32) * (1 - share) + np.asarray(bottom, np.float32) * share
    return np.repeat(column, size, axis=1)


def below_horizon(ground: Picture, sky: Picture, random: Random) -> Picture:
    """Ground under a sky; the horizon lies a quarter to two fifths from the top."""
    size = len(ground)
    horizon = int(size * random.uniform(0.25, 0.4))
    return np.concatenate([sky[:horizon], ground[horizon:]])


def day_sky(size: int, random: Random) -> Picture:
    clouds = np.clip(noise(size, random, 4, 8) * 2 - 1, 0, 1)
    return gradient(size, (0.35, 0.62, 0.92), (0.78, 0.9, 0.98)) * (1 - 0.7 * clouds) + 0.7 * clouds


def grass(size: int, random: Random) -> Picture:
    blades = noise(size, random, 64, 16)
    patches = noise(size, random, 5)
    dark, light = np.asarray((0.13, 0.42, 0.1), np.float32), np.asarray((0.5, 0.76, 0.25), np.float32)
    ground = dark + (light - dark) * (0.65 * blades + 0.35 * patches)
    return below_horizon(ground, day_sky(size, random), random)


def snow(size: int, random: Random) -> Picture:
    drifts = noise(size, random, 3, 10)
    ground = np.asarray((0.8, 0.87, 0.96), np.float32) + 0.2 * drifts
    sky = gradient(size, (0.62, 0.68, 0.76), (0.82, 0.85, 0.9))
    scene = below_horizon(np.clip(ground, 0, 1), sky, random)
    return _dots(scene, random, count=40, radius=0.011, colour=(255, 255, 255))


def sand(size: int, random: Random) -> Picture:
    waves = np.sin(np.linspace(0, 60, size, dtype=np.float32)[:, None, None] + 8 * noise(size, random, 4))
    ground = np.asarray((0.87, 0.74, 0.47), np.float32) + 0.05 * waves + 0.08 * (noise(size, random, 6) - 0.5)
    return below_horizon(np.clip(ground, 0, 1), day_sky(size, random), random)


def water(size: int, random: Random) -> Picture:
    waves = noise(size, random, 6, 28)
    deep, light = np.asarray((0.03, 0.25, 0.55), np.float32), np.asarray((0.3, 0.66, 0.85), np.float32)
    return below_horizon(deep + (light - deep) * waves**1.5, day_sky(size, random), random)


def wood(size: int, random: Random) -> Picture:
    grain = noise(size, random, 3, 48)
    planks = int(random.integers(3, 6))
    row = np.arange(size) * planks // size
    tone = random.uniform(-0.06, 0.06, planks).astype(np.float32)[row][:, None, None]
    floor = np.asarray((0.55, 0.34, 0.17), np.float32) + 0.16 * (grain - 0.5) + tone
    gaps = np.flatnonzero(np.diff(row))
    floor[gaps] = floor[gaps] * 0.45
    return np.clip(np.broadcast_to(floor, (size, size, 3)), 0, 1)


def night(size: int, random: Random) -> Picture:
    sky = _dots(gradient(size, (0.01, 0.02, 0.1), (0.12, 0.13, 0.34)), random, 45, 0.006, (255, 250, 220))
    centre = random.uniform(0.1, 0.9), random.uniform(0.08, 0.2)
    sky = _disc(sky, centre, 0.06, (246, 240, 205))
    hills = np.broadcast_to(np.asarray((0.03, 0.05, 0.08), np.float32), sky.shape) + 0.03 * noise(size, random, 8)
    height = int(size * random.uniform(0.75, 0.88))
    return np.concatenate([sky[:height], hills[height:]]).astype(np.float32)


def brick(size: int, random: Random) -> Picture:
    rows = int(random.integers(8, 12))
    height, width = size / rows, 2.2 * size / rows
    wall = Image.new("RGB", (size, size), (196, 186, 174))
    draw = ImageDraw.Draw(wall)
    gap = max(1, size // 100)
    for row in range(rows + 1):
        left = -width * (0.5 * (row % 2) + random.uniform(0, 0.05))
        while left < size:
            shade = random.uniform(0.82, 1.12)
            colour = tuple(int(min(255, channel * shade)) for channel in (168, 74, 54))
            draw.rectangle((left + gap, row * height + gap, left + width - gap, (row + 1) * height - gap), fill=colour)
            left += width
    return np.clip(_floats(wall) + 0.08 * (noise(size, random, 40) - 0.5), 0, 1)


def sunset(size: int, random: Random) -> Picture:
    sky = gradient(size, (0.36, 0.16, 0.45), (1.0, 0.62, 0.2))
    middle = random.uniform(0.2, 0.8), random.uniform(0.55, 0.7)
    sky = _disc(sky, middle, 0.13, (255, 228, 130))
    land = np.asarray((0.2, 0.08, 0.16), np.float32) + 0.06 * noise(size, random, 10)
    land = np.broadcast_to(land, sky.shape)
    height = int(size * random.uniform(0.72, 0.85))
    return np.concatenate([sky[:height], land[height:]]).astype(np.float32)


PLACES: tuple[Place, ...] = (
    Place("grass", ("on the grass", "in a meadow"), grass),
    Place("snow", ("in the snow", "in winter"), snow),
    Place("sand", ("on the beach", "in the sand"), sand),
    Place("water", ("in the sea", "in the water"), water),
    Place("wood", ("on a wooden floor", "on wood"), wood),
    Place("night", ("at night", "under the stars"), night),
    Place("brick", ("in front of a brick wall", "by a brick wall"), brick),
    Place("sunset", ("at sunset", "in the evening sun"), sunset),
)


def _floats(picture: Image.Image) -> Picture:
    return np.asarray(picture, np.float32) / 255


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def _dots(picture: Picture, random: Random, count: int, radius: float, colour: tuple[int, int, int]) -> Picture:
    """Small discs at random places; ``radius`` is the largest, as a part of the edge."""
    size = len(picture)
    image = _image(picture)
    draw = ImageDraw.Draw(image)
    for x, y, scale in random.random((count, 3)):
        r = max(0.5, radius * size * (0.4 + 0.6 * scale))
        draw.ellipse((x * size - r, y * size - r, x * size + r, y * size + r), fill=colour)
    return _floats(image)


def _disc(picture: Picture, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]) -> Picture:
    size = len(picture)
    image = _image(picture)
    box = [size * (c + sign * radius) for sign in (-1, 1) for c in centre]
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return _floats(image)
