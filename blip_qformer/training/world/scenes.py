"""Scenes: one piece of artwork, posed and recoloured, standing in a place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .artwork import Artwork
from .places import PLACES, Place, Random

#: Captions of one scene; Subject Prompt Compose says ``a {word} {prompt}``, and so does each of these.
CAPTION = "a {word} {phrase}"


@dataclass(frozen=True)
class Look:
    """What stays the same in every picture of one subject.

    Args:
        hue: a turn of the colour wheel, in 0..1; 0 leaves the artwork's colours.
        mirrored: left and right exchanged.
        tilt: a rotation in degrees.
    """

    hue: float = 0.0
    mirrored: bool = False
    tilt: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Where a subject stands: its longer edge and its centre, as parts of the picture's edge."""

    size: float
    x: float
    y: float


def random_look(random: Random) -> Look:
    """Half of all subjects keep their colours; the rest gets others, so that a look is more than a word's."""
    return Look(
        hue=float(random.random()) if random.random() < 0.5 else 0.0,
        mirrored=bool(random.random() < 0.5),
        tilt=float(random.uniform(-8, 8)),
    )


def random_placement(random: Random) -> Placement:
    """Near the middle, two thirds of the picture large, so that filters of real photographs would keep it."""
    return Placement(
        size=float(random.uniform(0.58, 0.76)),
        x=float(random.uniform(0.44, 0.56)),
        y=float(random.uniform(0.5, 0.6)),
    )


def cut_out(artwork: Artwork, look: Look, edge: int) -> Image.Image:
    """The artwork in a look, RGBA, cropped to what is drawn, its longer edge ``edge`` pixels."""
    picture = _trimmed(artwork.file)
    if look.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if look.hue:
        picture = turn_hue(picture, look.hue)
    if look.tilt:
        picture = picture.rotate(look.tilt, Image.Resampling.BICUBIC, expand=True)
        picture = picture.crop(picture.getchannel("A").getbbox())
    scale = edge / max(picture.size)
    return picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), Image.Resampling.LANCZOS)


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Move all colours along the colour wheel; greys stay grey."""
    alpha = picture.getchannel("A")
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    hue = hue.point(lambda level: (level + round(turn * 256)) % 256)
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    turned.putalpha(alpha)
    return turned


def compose(subject: Image.Image, background: Image.Image, placement: Placement) -> Image.Image:
    """Stand a cut-out subject on a background, RGB."""
    width, height = background.size
    corner = round(placement.x * width - subject.width / 2), round(placement.y * height - subject.height / 2)
    scene = background.copy()
    scene.paste(subject, corner, subject)
    return scene


def paint_place(place: Place, edge: int, random: Random) -> Image.Image:
    """One picture of a place, RGB, ``edge`` pixels square."""
    return Image.fromarray((place.paint(edge, random) * 255).round().astype(np.uint8))


def picture_of(artwork: Artwork, look: Look, place: Place, placement: Placement, edge: int, seed: int) -> Image.Image:
    """A whole scene, RGB, ``edge`` pixels square; the same for the same arguments."""
    background = paint_place(place, edge, np.random.default_rng(seed))
    return compose(cut_out(artwork, look, round(placement.size * edge)), background, placement)


def random_place(random: Random, other_than: Place | None = None) -> Place:
    choices = [place for place in PLACES if place is not other_than]
    return choices[random.integers(len(choices))]


@lru_cache(maxsize=4096)
def _trimmed(file: Path) -> Image.Image:
    picture = Image.open(file).convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())
