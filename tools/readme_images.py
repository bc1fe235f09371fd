"""Make the README's first image, and the registry's icon and banner, from the row that ``make demo`` samples.

``python -m tools.readme_images`` reads ``mini/contexts.jpg``, in which the small model's results stand behind the image
that was given, and writes into ``assets/``.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from blip_qformer.atomic import atomic_file
from tools.demo import CONTEXTS, WORD
from tools.host import ROOT

ROW = ROOT / "mini" / "contexts.jpg"
ASSETS = ROOT / "assets"

DARK, LIGHT, GREY = "#191c24", "#ffffff", "#5b616e"
MADE_BY = (
    "Drawn by the small model in this repository, which knows a world of emoji. The published model knows photographs."
)


def read_row() -> list[Image.Image]:
    """Return the given image and the sampled ones, which are squares beside each other."""
    row = Image.open(ROW).convert("RGB")
    edge = row.height
    return [row.crop((left, 0, left + edge, edge)) for left in range(0, row.width, edge)]


def first_image() -> Image.Image:
    """Draw what goes in, with its word, and what comes out, with its prompts; 1600 x 470 pixels."""
    given, *sampled = read_row()
    sheet = Image.new("RGB", (1600, 470), LIGHT)
    draw = ImageDraw.Draw(sheet)
    _paste(sheet, given, (20, 60), 300)
    _caption(draw, (170, 30), "one picture, one word", 24)
    _caption(draw, (170, 384), f"“{WORD}”", 26)
    _arrow(draw, (335, 210), 70, GREY)
    _caption(draw, (995, 30), "the same thing, wherever you ask for it", 24)
    for index, (image, context) in enumerate(zip(sampled, CONTEXTS, strict=True)):
        left = 420 + index * 292
        _paste(sheet, image, (left, 71), 278)
        _caption(draw, (left + 139, 384), f"“{context}”", 26)
    _caption(draw, (800, 440), MADE_BY, 19, GREY)
    return sheet


def banner() -> Image.Image:
    """Draw the given image, an arrow and the four sampled ones; 1260 x 540 pixels, the registry's 21:9."""
    given, *sampled = read_row()
    sheet = Image.new("RGB", (1260, 540), DARK)
    _paste(sheet, given, (90, 80), 380)
    _arrow(ImageDraw.Draw(sheet), (515, 270), 110, "#c8ccd6")
    for index, image in enumerate(sampled):
        _paste(sheet, image, (680 + index % 2 * 252, 25 + index // 2 * 248), 240)
    return sheet


def icon() -> Image.Image:
    """Draw a sampled image, and on its corner the image that was given; 400 x 400 pixels."""
    given, _, sampled, *_ = read_row()
    sheet = Image.new("RGB", (400, 400), DARK)
    _paste(sheet, sampled, (96, 96), 290, radius=40)
    ImageDraw.Draw(sheet).rounded_rectangle((0, 0, 189, 189), 38, fill=DARK)
    _paste(sheet, given, (14, 14), 164, radius=28)
    return sheet


def main() -> int:
    """Write the images, print their names, and return the exit code."""
    for name, image in (("subject-drawn.jpg", first_image()), ("banner.png", banner()), ("icon.png", icon())):
        path = ASSETS / name
        _save(image, path)
        print(f"Wrote {path.relative_to(ROOT)} ({path.stat().st_size / 1000:.0f} kB).")
    return 0


def _save(image: Image.Image, path: Path) -> None:
    with atomic_file(path) as temporary:
        image.save(temporary, format="JPEG" if path.suffix == ".jpg" else "PNG", quality=90, optimize=True)


def _paste(sheet: Image.Image, image: Image.Image, corner: tuple[int, int], edge: int, radius: int = 24) -> None:
    """Paste an image as a square with round corners."""
    mask = Image.new("L", (4 * edge, 4 * edge))  # four times as large, for a smooth edge
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * edge - 1, 4 * edge - 1), 4 * radius, fill=255)
    scaled = image.resize((edge, edge), Image.Resampling.LANCZOS)
    sheet.paste(scaled, corner, mask.resize((edge, edge), Image.Resampling.LANCZOS))


def _caption(draw: ImageDraw.ImageDraw, middle: tuple[int, int], text: str, size: int, colour: str = "#191c24") -> None:
    draw.text(middle, text, fill=colour, font=ImageFont.load_default(size), anchor="mm")


def _arrow(draw: ImageDraw.ImageDraw, tail: tuple[int, int], length: int, colour: str) -> None:
    left, middle = tail
    head = left + length
    draw.rectangle((left, middle - length // 10, head - length // 3, middle + length // 10), fill=colour)
    points = [(head - length // 2, middle - length // 3), (head, middle), (head - length // 2, middle + length // 3)]
    draw.polygon(points, fill=colour)


if __name__ == "__main__":
    raise SystemExit(main())
