"""Compositing: a subject with an alpha channel over a background (Porter and Duff, SIGGRAPH 1984, "over")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .resizing import resize


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the frame of a new one.

    Args:
        scale: Size of the image; at 1 it is as large as it fits inside the frame.
        x: Shift of its centre from the frame's, to the right, in fractions of the frame's width.
        y: Shift of its centre from the frame's, downwards, in fractions of the frame's height.
    """

    scale: float = 1.0
    x: float = 0.0
    y: float = 0.0


def composite(foreground: Tensor, alpha: Tensor, background: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """Alpha-blend a subject over a background; nothing is resampled if the size stays the same.

    Args:
        foreground: The subject's colours, of shape [H, W, 3] in 0..1.
        alpha: The subject's opacity, of shape [H, W] in 0..1.
        background: An image of shape [h, w, 3] in 0..1.
        placement: Where the subject's image lies in the background's frame.

    Returns:
        The image of shape [h, w, 3], and the subject's opacity in it of shape [h, w], which is 0 everywhere if the
        subject lies outside.
    """
    frame_height, frame_width = background.shape[:2]
    scale = min(frame_height / alpha.shape[0], frame_width / alpha.shape[1]) * placement.scale
    height, width = (max(1, round(edge * scale)) for edge in alpha.shape)
    # Colours are weighted by opacity: what is transparent must not bleed into the edge when resized.
    layer = resize(torch.cat([foreground * alpha[..., None], alpha[..., None]], dim=-1), height, width)
    top = round((frame_height - height) / 2 + placement.y * frame_height)
    left = round((frame_width - width) / 2 + placement.x * frame_width)
    canvas = layer.new_zeros(frame_height, frame_width, 4)
    rows, columns = _visible(top, height, frame_height), _visible(left, width, frame_width)
    canvas[rows, columns] = layer[_shift(rows, -top), _shift(columns, -left)]
    colours, opacity = canvas[..., :3], canvas[..., 3:]
    return colours + background * (1 - opacity), opacity[..., 0]


def _visible(start: int, length: int, frame: int) -> slice:
    """The part of a frame that is covered by a run, which may begin before it and end behind it."""
    return slice(min(max(start, 0), frame), max(min(start + length, frame), 0))


def _shift(run: slice, offset: int) -> slice:
    return slice(run.start + offset, run.stop + offset)
