"""Pictures side by side on one sheet, the pictures they were made from at its ends or corners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..encoder.preprocessing import composite_alpha

WHITE, INK = 1.0, 0


GAP_PART, LABEL_PART = 64, 12  # of a cell's edge: the gap between cells, and the strip a label stands in


LABEL_HEIGHTS = (12, 48)


LETTER_PART = 0.7  # of the strip's height


@dataclass(frozen=True)
class Layout:
    """Which cell of a sheet holds what.

    Args:
        rows, columns: of the whole sheet.
        pictures: (row, column) of each picture.
        sources: (row, column) where each of the four sources would stand.
    """

    rows: int
    columns: int
    pictures: tuple[tuple[int, int], ...]
    sources: tuple[tuple[int, int], ...]


def contact_sheet(
    pictures: Tensor,
    sources: Sequence[Tensor | None] = (),
    columns: int = 0,
    labels: Sequence[str] = (),
    longest_side: int = 8192,
) -> Tensor:
    """Lay pictures out in rows, each in a cell of its own with a label below it.

    Args:
        pictures: [N, H, W, C] in 0..1, in reading order.
        sources: up to four pictures [1, H, W, C] of any size, or None; see :func:`lay_out` for where they stand.
        columns: pictures in a row; 0 chooses, see :func:`lay_out`.
        labels: for the pictures and then for the sources that are there; those left out stay blank, more are dropped.
        longest_side: a sheet that would be longer, in pixels, is drawn smaller, so that it fits into memory.

    Returns:
        [1, height, width, 3]
    """
    present = [source is not None for source in sources]
    layout = lay_out(len(pictures), present, columns)
    cells = [(pictures[index : index + 1], place) for index, place in enumerate(layout.pictures)]
    cells += [(source[:1], place) for source, place in zip(sources, layout.sources, strict=False) if source is not None]

    height, width = pictures.shape[1:3]
    strip = min(max(height // LABEL_PART, LABEL_HEIGHTS[0]), LABEL_HEIGHTS[1]) if any(labels) else 0
    gap = max(1, min(height, width) // GAP_PART)
    scale = min(
        1.0, longest_side / max(layout.rows * (height + strip + gap) + gap, layout.columns * (width + gap) + gap)
    )
    height, width, gap = (max(1, int(edge * scale)) for edge in (height, width, gap))
    strip = int(strip * scale)

    sheet = torch.full((3, layout.rows * (height + strip + gap) + gap, layout.columns * (width + gap) + gap), WHITE)
    for number, (picture, (row, column)) in enumerate(cells):
        top, left = gap + row * (height + strip + gap), gap + column * (width + gap)
        sheet[:, top : top + height, left : left + width] = fit(picture, height, width)
        if strip and number < len(labels) and labels[number]:
            sheet[:, top + height : top + height + strip, left : left + width] = draw_label(
                labels[number], strip, width
            )
    return sheet.permute(1, 2, 0)[None].contiguous()


def lay_out(count: int, has_source: Sequence[bool] = (), columns: int = 0) -> Layout:
    """Where ``count`` pictures and their sources stand.

    One or two sources are the ends of a line: left of the first picture and right of the last. A third or fourth makes
    them the corners of a square, top left, top right, bottom left and bottom right. Both take a column on each side.

    Args:
        columns: pictures in a row; 0: all in one row for a line with sources, else as square as it gets.
    """
    is_square, has_sides = any(has_source[2:]), any(has_source)
    if columns == 0:
        columns = count if has_sides and not is_square else math.ceil(math.sqrt(count))
    columns = max(1, min(columns, count))
    rows = max(math.ceil(count / columns), 2 if is_square else 1)  # four corners need two rows
    side = 1 if has_sides else 0
    last = columns + 1
    return Layout(
        rows,
        columns + 2 * side,
        tuple((index // columns, index % columns + side) for index in range(count)),
        ((0, 0), (0 if is_square else rows - 1, last), (rows - 1, 0), (rows - 1, last)),
    )


def fit(picture: Tensor, height: int, width: int) -> Tensor:
    """[1, H, W, C] -> [3, height, width]: as large as fits, in the middle of white; the right size stays bit by bit."""
    picture = composite_alpha(picture.cpu().nan_to_num())  # [1, 3, H, W]
    scale = min(height / picture.shape[2], width / picture.shape[3])
    size = tuple(
        min(edge, max(1, round(old * scale))) for old, edge in zip(picture.shape[2:], (height, width), strict=True)
    )
    if picture.shape[2:] != size:
        picture = F.interpolate(picture, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return F.pad(picture, (left, width - size[1] - left, top, height - size[0] - top), value=WHITE)[0]


def draw_label(text: str, height: int, width: int) -> Tensor:
    """A line of text in Pillow's own font, centred and made smaller if it is too long -> [height, width]."""
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    size = height * LETTER_PART
    length = draw.textlength(text, _font(size))
    if length > width:
        size *= width / length
    draw.text((width / 2, height / 2), text, INK, _font(size), anchor="mm")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width) / 255


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(1.0, size))
