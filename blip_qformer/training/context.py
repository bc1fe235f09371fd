"""Prompted context generation: a subject on another background (arXiv 2305.14720, section 4.1).

The photograph's subject is cut out, and what is asked of the model later is to draw the photograph when it sees the
subject elsewhere: so it cannot learn to copy the background.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .filters import Box
from .matting import OPAQUE, THRESHOLDS, NoSubjectError, matte, resized, trimap_of

SMALLEST_EXTENT, LARGEST_EXTENT = 0.5, 0.95  # of a subject at random, as a part of the new picture
AT_BORDER = 0.01  # a subject that comes so near to a border is cut off by it
SMALLEST_WINDOW = 0.5  # of a background at random, as a part of its edge


@dataclass(frozen=True)
class Placement:
    """Where a picture's frame comes to lie in a new one.

    Args:
        scale: 1: as large as it fits inside.
        x, y: how far it is moved from the middle, to the right and down, as parts of the new width and height.
    """

    scale: float = 1.0
    x: float = 0.0
    y: float = 0.0


def subject_in_context(
    photograph: Tensor,
    probability: Tensor,
    background: Tensor,
    order: random.Random,
    thresholds: tuple[float, float] = THRESHOLDS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The input for a photograph: its subject at a random place of a random part of a background.

    The subject's longer edge becomes 50 to 95 % of the picture's, and all of it is inside: at a border if the
    photograph cuts it off there, else anywhere. The background is a window of the photograph's shape, whose edge is 50
    to 100 % of the largest one's.

    Args:
        photograph: [H, W, 3] in 0..1.
        probability: [H, W], where the subject is.
        background: [h, w, 3].
        order: all that is random comes from it.
        thresholds: of the probability, see :func:`~.matting.trimap_of`.
    Returns:
        picture [H, W, 3], its alpha [H, W], and the alpha in the photograph [H, W].
    Raises:
        NoSubjectError, MattingError: there is none, or it cannot be cut out.
        ValueError: pymatting is missing, or the thresholds are not in order.
    """
    height, width = photograph.shape[:2]
    alpha, foreground = matte(photograph, trimap_of(probability, thresholds))
    placement = random_placement(extent_of(alpha), order)
    window = random_window(background, height, width, order)
    picture, placed = place(foreground, alpha, window, placement)
    return picture, placed, alpha


def place(foreground: Tensor, alpha: Tensor, background: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """Alpha-blend a subject onto a background; of the same size and in its own place, without resampling.

    Args:
        foreground: [H, W, 3], its colours; ``alpha``: [H, W], its opacity.
        background: [h, w, 3]
    Returns:
        picture [h, w, 3] and the alpha there [h, w], which is 0 everywhere if the subject lies outside.
    """
    new_height, new_width = background.shape[:2]
    scale = min(new_height / alpha.shape[0], new_width / alpha.shape[1]) * placement.scale
    height, width = (max(1, round(edge * scale)) for edge in alpha.shape)
    # Colours weighted by opacity: what is transparent must not bleed into the edge when scaled.
    layer = resized(torch.cat([foreground * alpha[..., None], alpha[..., None]], dim=-1), height, width)
    top = round((new_height - height) / 2 + placement.y * new_height)
    left = round((new_width - width) / 2 + placement.x * new_width)
    canvas = layer.new_zeros(new_height, new_width, 4)
    rows, columns = _overlap(top, height, new_height), _overlap(left, width, new_width)
    canvas[rows, columns] = layer[_shifted(rows, -top), _shifted(columns, -left)]
    colour, opacity = canvas[..., :3], canvas[..., 3:]
    return colour + background * (1 - opacity), opacity[..., 0]


def extent_of(alpha: Tensor) -> Box:
    """The box around what is not nearly transparent, as parts of width and height; [H, W].

    Raises:
        NoSubjectError: everything is.
    """
    if not (alpha > OPAQUE).any():
        raise NoSubjectError("Nothing in the picture is opaque, so there is no subject.")
    rows, columns = ((alpha > OPAQUE).any(dim=axis).nonzero() for axis in (1, 0))
    height, width = alpha.shape
    top, bottom, left, right = rows.min().item(), rows.max().item() + 1, columns.min().item(), columns.max().item() + 1
    return left / width, top / height, right / width, bottom / height


def random_placement(extent: Box, order: random.Random) -> Placement:
    """A placement that keeps all of a subject inside; the two frames have the same shape.

    A subject that the photograph's border cuts off stays at that border: it would float in the air elsewhere.
    """
    left, top, right, bottom = extent
    scale = order.uniform(SMALLEST_EXTENT, LARGEST_EXTENT) / max(right - left, bottom - top)
    shifts = []
    for begin, end in ((left, right), (top, bottom)):
        free = 1 - (end - begin) * scale
        wanted = order.uniform(-free / 2, free / 2)  # of the middle of the subject from that of the frame
        is_cut_before, is_cut_behind = begin < AT_BORDER, end > 1 - AT_BORDER
        if is_cut_before != is_cut_behind:
            wanted = free / 2 if is_cut_behind else -free / 2
        shifts.append(wanted - ((begin + end) / 2 - 0.5) * scale)
    return Placement(scale, *shifts)


def random_window(background: Tensor, height: int, width: int, order: random.Random) -> Tensor:
    """A part of a background [h, w, 3], scaled to [height, width, 3]."""
    part = order.uniform(SMALLEST_WINDOW, 1.0)
    return _window(background, height, width, part, order.random(), order.random())


def cover(background: Tensor, height: int, width: int) -> Tensor:
    """The middle of a background [h, w, 3], as much as has the shape, scaled to [height, width, 3]."""
    return _window(background, height, width, 1.0, 0.5, 0.5)


def _window(background: Tensor, height: int, width: int, part: float, x: float, y: float) -> Tensor:
    """A window of the shape ``height`` x ``width``; x and y, in 0..1, say where in the room that is left it lies."""
    full_height, full_width = background.shape[:2]
    scale = min(full_height / height, full_width / width) * part
    window_height, window_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = round((full_height - window_height) * y), round((full_width - window_width) * x)
    return resized(background[top : top + window_height, left : left + window_width], height, width)


def _overlap(start: int, length: int, room: int) -> slice:
    """Where in ``room`` a run lies that may begin before it and end behind it."""
    return slice(min(max(start, 0), room), max(min(start + length, room), 0))


def _shifted(run: slice, by: int) -> slice:
    return slice(run.start + by, run.stop + by)
