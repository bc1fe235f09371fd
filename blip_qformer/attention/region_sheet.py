"""The layout of regions as an image: a colour for each, with the word of its subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..imaging.contact_sheet import render_label
from ..prompt import SUBJECT_WORD, TokenSpan
from .edits import Region
from .regions import region_weights
from .words import readable

#: Colours that people with any colour vision tell apart (Okabe and Ito, 2008); further regions begin again.
COLOURS = torch.tensor(
    [
        (0.90, 0.62, 0.00),
        (0.34, 0.71, 0.91),
        (0.00, 0.62, 0.45),
        (0.94, 0.89, 0.26),
        (0.00, 0.45, 0.70),
        (0.84, 0.37, 0.00),
        (0.80, 0.47, 0.65),
    ]
)
SCENE = 0.85  # grey of what is left to the scene
LABEL_DIVISOR = 14  # the image's edge divided by this is a label's height


def region_sheet(regions: Sequence[Region], height: int, width: int) -> Tensor:
    """Show which part of an image each region has.

    Args:
        regions: The regions.
        height: Height of the sheet in pixels.
        width: Width of the sheet in pixels.

    Returns:
        Sheets of shape [B, height, width, 3] in 0..1, one for each image that has masks of its own.
    """
    weights = region_weights(regions, height, width)  # [1 + regions, B, height, width]
    colours = torch.cat([torch.full((1, 3), SCENE), COLOURS[torch.arange(len(regions)) % len(COLOURS)]])
    sheets = torch.einsum("rbhw,rc->bhwc", weights, colours)
    for number, region in enumerate(regions, start=1):
        for sheet, own_weights in zip(sheets, weights[number], strict=True):
            _label(sheet, own_weights, region_name(region.words) or f"region {number}")
    return sheets.clamp(0, 1)


def region_name(words: Sequence[TokenSpan]) -> str:
    """Return the word that a region is called by: the one behind a subject, else the first two that are no article.

    Args:
        words: Words of the region's prompt in order.

    Returns:
        The name; empty if no words are known.
    """
    spelled = [readable(span.word) for span in words]
    if SUBJECT_WORD in spelled[:-1]:
        return spelled[spelled.index(SUBJECT_WORD) + 1]
    named = [word for word in spelled if word not in ("a", "an", "the") and any(letter.isalnum() for letter in word)]
    return " ".join(named[:2])


def _label(sheet: Tensor, weights: Tensor, text: str) -> None:
    """Write a name into the middle of what a region has, in place; a region without pixels gets none."""
    height, width = weights.shape
    rows, columns = (weights.any(dim=axis).nonzero() for axis in (1, 0))
    if not len(rows):
        return
    label_height = max(8, min(height, width) // LABEL_DIVISOR)
    label_width = min(width, max(2 * label_height, int(columns[-1] - columns[0]) + 1))
    label_height = min(label_height, height)
    ink = render_label(text, label_height, label_width)[..., None]
    top, left = (
        min(max(int(used[0] + used[-1] + 1 - length) // 2, 0), edge - length)
        for used, length, edge in ((rows, label_height, height), (columns, label_width, width))
    )
    sheet[top : top + label_height, left : left + label_width] *= ink
