"""Scenes: one piece of artwork, posed and recoloured, standing in a place."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        stretch: how many times wider it becomes for its height.
        shear: how far its top leans to the right, as a part of its height.
    """

    hue: float = 0.0
    mirrored: bool = False
    tilt: float = 0.0
    stretch: float = 1.0
    shear: float = 0.0


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


def varied_look(random: Random) -> Look:
    """A look that also changes the outline, so that no outline can be learnt by heart."""
    look = random_look(random)
    return replace(
        look,
        tilt=2 * look.tilt,
        stretch=float(np.exp(random.uniform(-0.4, 0.4))),
        shear=float(random.uniform(-0.25, 0.25)),
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
    return in_look(trimmed(artwork.file), look, edge)


def in_look(picture: Image.Image, look: Look, edge: int) -> Image.Image:
    """An RGBA picture in a look, cropped to what is drawn, its longer edge ``edge`` pixels."""
    if look.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if look.hue:
        picture = turn_hue(picture, look.hue)
    if look.stretch != 1 or look.shear:
        picture = _slanted(picture, look.stretch, look.shear)
    if look.tilt:
        picture = _cropped(picture.rotate(look.tilt, Image.Resampling.BICUBIC, expand=True))
    scale = edge / max(picture.size)
    return picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), Image.Resampling.LANCZOS)


def mixed(upper: Artwork, lower: Artwork) -> Image.Image:
    """A thing that nobody has drawn, RGBA: the upper half of one on the lower half of the other, equally wide."""
    top, bottom = trimmed(upper.file), trimmed(lower.file)
    bottom = bottom.resize((top.width, max(2, round(bottom.height * top.width / bottom.width))))
    top = top.crop((0, 0, top.width, max(1, top.height // 2)))
    bottom = bottom.crop((0, bottom.height // 2, bottom.width, bottom.height))
    picture = Image.new("RGBA", (top.width, top.height + bottom.height))
    picture.paste(top, (0, 0))
    picture.paste(bottom, (0, top.height))
    return _cropped(picture)


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


def _slanted(picture: Image.Image, stretch: float, shear: float) -> Image.Image:
    width, height = round(picture.width * stretch), picture.height
    lean = abs(shear) * height
    # From a place of the result to one of the picture: row y is moved to the right by shear * (height - y).
    matrix = (1 / stretch, shear / stretch, -max(shear, 0) * height / stretch, 0, 1, 0)
    size = (max(1, round(width + lean)), height)
    return _cropped(picture.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


def _cropped(picture: Image.Image) -> Image.Image:
    """What is drawn of an RGBA picture; all of it where nothing is."""
    return picture.crop(picture.getchannel("A").getbbox())


@lru_cache(maxsize=8192)
def trimmed(file: Path) -> Image.Image:
    """What is drawn in an artwork's file, RGBA.

    Raises:
        OSError: it is no picture, or part of one; the file is named.
    """
    try:
        return _cropped(Image.open(file).convert("RGBA"))
    except Exception as error:  # Pillow raises what it likes for a damaged file: SyntaxError and EOFError, too
        raise OSError(f"{file.parent.name}/{file.name}: {error}") from error
