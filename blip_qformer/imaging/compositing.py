"""Prompted context generation: a subject on another background (arXiv 2305.14720, section 4.1).

The photograph's subject is cut out, and what is asked of the model later is to draw the photograph when it sees the
subject elsewhere: so it cannot learn to copy the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.filters import Box
from .matting import OPAQUE, NoSubjectError, resized


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


def cover(background: Tensor, height: int, width: int) -> Tensor:
    """The middle of a background [h, w, 3], as much as has the shape, scaled to [height, width, 3]."""
    return crop_window(background, height, width, 1.0, 0.5, 0.5)


def crop_window(background: Tensor, height: int, width: int, part: float, x: float, y: float) -> Tensor:
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
