"""A small artwork folder: shapes in three styles, some of whose words are held out."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from mini.world.artwork import is_held_out_word

STYLES = ("fluent", "noto", "twemoji")
TRAINED = [word for word in (f"shape{number}" for number in range(100)) if not is_held_out_word(word)][:6]
HELD_OUT = [word for word in (f"shape{number}" for number in range(100)) if is_held_out_word(word)][:4]


def write_artwork(folder: Path) -> Path:
    """Ten things, each in three styles: another colour for every thing, another outline for every style."""
    lines = []
    for number, word in enumerate(TRAINED + HELD_OUT):
        code = f"1f{number:03x}"
        lines.append(json.dumps({"code": code, "word": word, "category": "Objects"}))
        colour = tuple((37 * number + 90 * channel) % 256 for channel in range(3))
        for corners, style in enumerate(STYLES, start=3):
            (folder / style).mkdir(parents=True, exist_ok=True)
            image = Image.new("RGBA", (64, 64))
            ImageDraw.Draw(image).regular_polygon((32, 32, 28), corners, fill=(*colour, 255))
            image.save(folder / style / f"{code}.png")
    (folder / "things.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
