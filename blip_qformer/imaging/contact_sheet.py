"""Images side by side on one sheet, the images they were made from at its ends or corners."""

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
GAP_DIVISOR, LABEL_DIVISOR = 64, 12  # a cell's edge divided by these is the gap between cells, and a label's height
LABEL_HEIGHTS = (12, 48)  # the least and the most, in pixels
FONT_SCALE = 0.7  # font size relative to a label's height


@dataclass(frozen=True)
class Layout:
    """The cells of a sheet.

    Args:
        rows: Number of rows of the whole sheet.
        columns: Number of columns of the whole sheet.
        images: Row and column of each image.
        sources: Row and column of each of the four sources, whether it is there or not.
    """

    rows: int
    columns: int
    images: tuple[tuple[int, int], ...]
    sources: tuple[tuple[int, int], ...]


def contact_sheet(
    images: Tensor | Sequence[Tensor],
    sources: Sequence[Tensor | None] = (),
    columns: int = 0,
    labels: Sequence[str] = (),
    longest_side: int = 8192,
) -> Tensor:
    """Lay images out in rows, each in a cell of its own with a label below it.

    Args:
        images: Images of shape [N, H, W, C] in 0..1, in reading order, or several such batches, each of a size of its
            own. A cell is as high and as wide as the largest.
        sources: Up to four images of shape [1, H, W, C] and any size, or None; see :func:`make_layout` for their cells.
        columns: Number of images in a row; 0 chooses, see :func:`make_layout`.
        labels: Labels of the images and then of the sources that are there; missing ones stay blank, more are dropped.
        longest_side: A sheet with a longer side, in pixels, is scaled down, so that it fits into memory.

    Returns:
        The sheet, of shape [1, height, width, 3].
    """
    batches = [images] if isinstance(images, Tensor) else images
    singles = [image for batch in batches for image in batch.split(1)]  # each [1, H, W, C]
    layout = make_layout(len(singles), [source is not None for source in sources], columns)
    cells = list(zip(singles, layout.images, strict=True))
    cells += [(source[:1], cell) for source, cell in zip(sources, layout.sources, strict=False) if source is not None]

    height, width = (max(image.shape[axis] for image in singles) for axis in (1, 2))
    strip = min(max(height // LABEL_DIVISOR, LABEL_HEIGHTS[0]), LABEL_HEIGHTS[1]) if any(labels) else 0
    gap = max(1, min(height, width) // GAP_DIVISOR)
    scale = min(
        1.0, longest_side / max(layout.rows * (height + strip + gap) + gap, layout.columns * (width + gap) + gap)
    )
    height, width, gap = (max(1, int(edge * scale)) for edge in (height, width, gap))
    strip = int(strip * scale)

    sheet = torch.full((3, layout.rows * (height + strip + gap) + gap, layout.columns * (width + gap) + gap), WHITE)
    for index, (image, (row, column)) in enumerate(cells):
        top, left = gap + row * (height + strip + gap), gap + column * (width + gap)
        sheet[:, top : top + height, left : left + width] = letterbox(image, height, width)
        if strip and index < len(labels) and labels[index]:
            label = render_label(labels[index], strip, width)
            sheet[:, top + height : top + height + strip, left : left + width] = label
    return sheet.permute(1, 2, 0)[None].contiguous()


def make_layout(count: int, has_source: Sequence[bool] = (), columns: int = 0) -> Layout:
    """Assign cells to images and their sources.

    One or two sources are the ends of a line: left of the first image and right of the last. A third or fourth makes
    them the corners of a square: top left, top right, bottom left and bottom right. Both add a column on each side.

    Args:
        count: Number of images.
        has_source: Which of up to four sources are there.
        columns: Number of images in a row; 0 means one row for a line with sources, else as square as possible.

    Returns:
        The cells, among them one for each of the four sources, whether it is there or not.
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


def letterbox(image: Tensor, height: int, width: int) -> Tensor:
    """Fit an image into the middle of a white cell; an image of the cell's size is not resampled.

    Args:
        image: An image of shape [1, H, W, C] in 0..1; transparency becomes white, NaN black.
        height: Height of the cell in pixels.
        width: Width of the cell in pixels.

    Returns:
        The cell, of shape [3, height, width].
    """
    image = composite_alpha(image.cpu().nan_to_num())  # [1, 3, H, W]
    image_height, image_width = image.shape[2:]
    scale = min(height / image_height, width / image_width)
    new_height = min(height, max(1, round(image_height * scale)))
    new_width = min(width, max(1, round(image_width * scale)))
    if (image_height, image_width) != (new_height, new_width):
        image = F.interpolate(image, size=(new_height, new_width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return F.pad(image, (left, width - new_width - left, top, height - new_height - top), value=WHITE)[0]


def render_label(text: str, height: int, width: int) -> Tensor:
    """Render a line of text in Pillow's own font, centred, and smaller if it is too long.

    Args:
        text: The label.
        height: Height of the strip in pixels.
        width: Width of the strip in pixels.

    Returns:
        A grey image of shape [height, width] in 0..1.
    """
    image = Image.new("L", (width, height), 255)
    pen = ImageDraw.Draw(image)
    size = height * FONT_SCALE
    length = pen.textlength(text, _font(size))
    if length > width:
        size *= width / length
    pen.text((width / 2, height / 2), text, INK, _font(size), anchor="mm")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width) / 255


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(1.0, size))
