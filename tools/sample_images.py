"""Make the sample pictures of the workflows that are no plain photographs: ``python -m tools.sample_images``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from blip_qformer.atomic import atomic_file
from tools.host import ROOT

EDGE, SCALE = 512, 4  # pixels of an image, and how much larger it is drawn, for smooth edges
SHIRT = [(176, 150), (216, 136), (256, 156), (296, 136), (336, 150), (404, 214), (366, 262), (334, 236)]
SHIRT += [(334, 408), (178, 408), (178, 236), (146, 262), (108, 214)]
FORM = [(232, 40), (280, 40), (288, 128), (352, 160), (340, 300), (352, 420), (160, 420), (172, 300), (160, 160)]
FORM += [(224, 128)]
PAINTED = (0.25, -0.05, 0.75, 0.85)  # the cup in its photograph: left, upper, right and lower edge, of width and height
PAINTED_SIZE, PAINTED_COLORS = (480, 320), 128  # a PNG of the whole photograph has 400 kB


def shirt() -> Image.Image:
    """A red shirt with white stripes on a plain background."""
    image = Image.new("RGB", (EDGE * SCALE,) * 2, "#b3bfc5")
    cloth = Image.new("RGB", image.size, "#c23b30")
    draw = ImageDraw.Draw(cloth)
    for top in range(120, 420, 36):
        draw.rectangle((0, top * SCALE, EDGE * SCALE, (top + 14) * SCALE), fill="#f7f1e3")
    return _finish(Image.composite(cloth, image, _mask(image, SHIRT)))


def dress_form() -> Image.Image:
    """A dress form in a grey shirt, before a wall."""
    image = Image.new("RGB", (EDGE * SCALE,) * 2, "#cfd9dd")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 440 * SCALE, EDGE * SCALE, EDGE * SCALE), fill="#9a7f63")
    draw.rectangle((248 * SCALE, 400 * SCALE, 264 * SCALE, 480 * SCALE), fill="#4b3a2c")
    draw.ellipse((190 * SCALE, 466 * SCALE, 322 * SCALE, 494 * SCALE), fill="#4b3a2c")
    for outline, color in ((FORM, "#e3c9a8"), (SHIRT, "#8a9099")):
        image.paste(color, mask=_mask(image, outline))
    return _finish(image)


def painted(image: Image.Image, box: tuple[float, float, float, float] = PAINTED) -> Image.Image:
    """Paint an ellipse over an image as the MaskEditor does: it becomes transparent and keeps its colors.

    Args:
        image: Any image.
        box: Left, upper, right and lower edge of the ellipse, as parts of the width and height.
    """
    rgba = image.convert("RGB").convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    ImageDraw.Draw(alpha).ellipse([edge * size for edge, size in zip(box, image.size * 2, strict=True)], fill=0)
    rgba.putalpha(alpha)
    return rgba


def painted_cup(folder: Path) -> Image.Image:
    """The photograph of a cup, with the cup painted over; smaller and in fewer colors than the photograph."""
    cup = Image.open(folder / "blip-diffusion-cup.jpg").resize(PAINTED_SIZE, Image.Resampling.LANCZOS)
    return painted(cup.quantize(PAINTED_COLORS, dither=Image.Dither.NONE))


def _mask(image: Image.Image, outline: list[tuple[int, int]]) -> Image.Image:
    """Return a mask of an outline with rounded corners."""
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon([(x * SCALE, y * SCALE) for x, y in outline], fill=255)
    return mask.filter(ImageFilter.GaussianBlur(6 * SCALE)).point(lambda value: 255 if value > 127 else 0)


def _finish(image: Image.Image) -> Image.Image:
    return image.resize((EDGE, EDGE), Image.Resampling.LANCZOS)


def main() -> int:
    """Write the pictures and return the exit code."""
    folder: Path = ROOT / "workflows" / "inputs"
    for name, image in (("shirt", shirt()), ("dress-form", dress_form()), ("cup-painted", painted_cup(folder))):
        with atomic_file(folder / f"blip-diffusion-{name}.png") as temporary:
            image.save(temporary, format="PNG", optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
