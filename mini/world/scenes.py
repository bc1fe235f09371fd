"""Scenes: one piece of artwork, recoloured and transformed, in front of a background."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .artwork import Artwork
from .backgrounds import BACKGROUNDS, Background

#: Captions of a scene; Subject Prompt Compose writes ``a {word} {prompt}``, and so does each of these.
CAPTION = "a {word} {phrase}"


@dataclass(frozen=True)
class Appearance:
    """What is the same in every image of one subject.

    Args:
        hue: Shift along the colour wheel, in 0..1; 0 leaves the artwork's colours.
        mirrored: Whether left and right are exchanged.
        tilt: Rotation in degrees, counter-clockwise.
        stretch: Factor of the width.
        shear: Shift of the top to the right, as a fraction of the height.
    """

    hue: float = 0.0
    mirrored: bool = False
    tilt: float = 0.0
    stretch: float = 1.0
    shear: float = 0.0


@dataclass(frozen=True)
class SubjectBox:
    """The square in a scene that a subject fits into.

    Args:
        size: Edge of the square, as a fraction of the image's edge.
        x: Centre from the left, as a fraction of the image's width.
        y: Centre from the top, as a fraction of the image's height.
    """

    size: float
    x: float
    y: float


def sample_appearance(rng: np.random.Generator) -> Appearance:
    """Sample an appearance that keeps the outline.

    Half of all subjects keep their colours. The others change them, so that the word does not tell the appearance.

    Args:
        rng: Source of randomness.

    Returns:
        The appearance.
    """
    return Appearance(
        hue=float(rng.random()) if rng.random() < 0.5 else 0.0,
        mirrored=bool(rng.random() < 0.5),
        tilt=float(rng.uniform(-8, 8)),
    )


def sample_varied_appearance(rng: np.random.Generator) -> Appearance:
    """Sample an appearance that also changes the outline, so that no outline can be memorised.

    Args:
        rng: Source of randomness.

    Returns:
        The appearance.
    """
    appearance = sample_appearance(rng)
    return replace(
        appearance,
        tilt=2 * appearance.tilt,
        stretch=float(np.exp(rng.uniform(-0.4, 0.4))),
        shear=float(rng.uniform(-0.25, 0.25)),
    )


def sample_box(rng: np.random.Generator) -> SubjectBox:
    """Sample a box near the middle, two thirds of the image large, as filters of real photographs would keep it.

    Args:
        rng: Source of randomness.

    Returns:
        The box.
    """
    return SubjectBox(
        size=float(rng.uniform(0.58, 0.76)),
        x=float(rng.uniform(0.44, 0.56)),
        y=float(rng.uniform(0.5, 0.6)),
    )


def sample_background(rng: np.random.Generator, other_than: Background | None = None) -> Background:
    """Sample one of the backgrounds.

    Args:
        rng: Source of randomness.
        other_than: A background that is left out.

    Returns:
        The background.
    """
    choices = [background for background in BACKGROUNDS if background is not other_than]
    return choices[rng.integers(len(choices))]


@lru_cache(maxsize=8192)
def open_artwork(file: Path) -> Image.Image:
    """Open the image of a piece of artwork, cropped to what is not transparent.

    Args:
        file: The image's file.

    Returns:
        The image, RGBA.

    Raises:
        OSError: The file is no image, or incomplete; it is named.
    """
    try:
        return _crop_to_content(Image.open(file).convert("RGBA"))
    except Exception as error:  # Pillow raises all kinds for a damaged file, SyntaxError and EOFError among them
        raise OSError(f"{file.parent.name}/{file.name}: {error}") from error


def join_halves(upper: Artwork, lower: Artwork) -> Image.Image:
    """Make a new thing of two: the upper half of one on the lower half of the other, equally wide.

    Args:
        upper: The piece of artwork whose upper half is used.
        lower: The piece of artwork whose lower half is used.

    Returns:
        The image, RGBA, cropped to what is not transparent.

    Raises:
        OSError: A file is no image, or incomplete.
    """
    top, bottom = open_artwork(upper.file), open_artwork(lower.file)
    bottom = bottom.resize((top.width, max(2, round(bottom.height * top.width / bottom.width))))
    top = top.crop((0, 0, top.width, max(1, top.height // 2)))
    bottom = bottom.crop((0, bottom.height // 2, bottom.width, bottom.height))
    joined = Image.new("RGBA", (top.width, top.height + bottom.height))
    joined.paste(top, (0, 0))
    joined.paste(bottom, (0, top.height))
    return _crop_to_content(joined)


def apply_appearance(image: Image.Image, appearance: Appearance, edge: int) -> Image.Image:
    """Recolour and transform a cut-out.

    Args:
        image: The cut-out, RGBA.
        appearance: What is changed.
        edge: Longer edge of the result, in pixels.

    Returns:
        The image, RGBA, cropped to what is not transparent.
    """
    if appearance.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if appearance.hue:
        image = shift_hue(image, appearance.hue)
    if appearance.stretch != 1 or appearance.shear:
        image = _stretch_and_shear(image, appearance.stretch, appearance.shear)
    if appearance.tilt:
        image = _crop_to_content(image.rotate(appearance.tilt, Image.Resampling.BICUBIC, expand=True))
    scale = edge / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Shift all colours along the colour wheel; greys stay grey.

    Args:
        image: An image, RGBA.
        shift: The shift; 1 is once around.

    Returns:
        The image, RGBA, with the same alpha.
    """
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    hue = hue.point([(level + round(shift * 256)) % 256 for level in range(256)])
    shifted = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    shifted.putalpha(image.getchannel("A"))
    return shifted


def cut_out(artwork: Artwork, appearance: Appearance, edge: int) -> Image.Image:
    """Open a piece of artwork and give it an appearance.

    Args:
        artwork: The piece of artwork.
        appearance: Appearance of the artwork in the scene.
        edge: Longer edge of the result, in pixels.

    Returns:
        The image, RGBA, cropped to what is not transparent.

    Raises:
        OSError: The file is no image, or incomplete.
    """
    return apply_appearance(open_artwork(artwork.file), appearance, edge)


def render_background(background: Background, edge: int, rng: np.random.Generator) -> Image.Image:
    """Render a background.

    Args:
        background: The background.
        edge: Edge of the image, in pixels.
        rng: Source of randomness.

    Returns:
        The image, RGB.
    """
    return Image.fromarray((background.render(edge, rng) * 255).round().astype(np.uint8))


def paste_subject(subject: Image.Image, canvas: Image.Image, box: SubjectBox) -> Image.Image:
    """Paste a cut-out over an image.

    Args:
        subject: The cut-out, RGBA, as large as it will appear.
        canvas: The image behind it, RGB; it stays as it is.
        box: Box at whose centre the subject's centre lies.

    Returns:
        The scene, RGB, of the canvas's size.
    """
    corner = round(box.x * canvas.width - subject.width / 2), round(box.y * canvas.height - subject.height / 2)
    scene = canvas.copy()
    scene.paste(subject, corner, subject)
    return scene


def render_scene(
    artwork: Artwork, appearance: Appearance, background: Background, box: SubjectBox, edge: int, seed: int
) -> Image.Image:
    """Render a whole scene; the same for the same arguments.

    Args:
        artwork: The piece of artwork.
        appearance: Appearance of the artwork in the scene.
        background: What is behind it.
        box: The box it fits into.
        edge: Edge of the image, in pixels.
        seed: Seed of the background.

    Returns:
        The scene, RGB.
    """
    canvas = render_background(background, edge, np.random.default_rng(seed))
    return paste_subject(cut_out(artwork, appearance, round(box.size * edge)), canvas, box)


def _stretch_and_shear(image: Image.Image, stretch: float, shear: float) -> Image.Image:
    width, height = round(image.width * stretch), image.height
    lean = abs(shear) * height
    # From coordinates of the result to those of the image: row y is moved to the right by shear * (height - y).
    matrix = (1 / stretch, shear / stretch, -max(shear, 0) * height / stretch, 0, 1, 0)
    size = (max(1, round(width + lean)), height)
    return _crop_to_content(image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


def _crop_to_content(image: Image.Image) -> Image.Image:
    """Crop an RGBA image to what is not transparent; an image without content stays whole."""
    return image.crop(image.getchannel("A").getbbox())
