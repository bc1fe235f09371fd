"""Prompted context generation: a subject on another background (arXiv 2305.14720, section 4.1).

The photograph's subject is cut out, and what is asked of the model later is to draw the photograph when it sees the
subject elsewhere: so it cannot learn to copy the background.
"""

from __future__ import annotations

import random

from torch import Tensor

from ..imaging.compositing import Placement, composite
from ..imaging.masks import Box, bounding_box
from ..imaging.matting import THRESHOLDS, make_trimap, matte
from ..imaging.resizing import crop_resize

SMALLEST_EXTENT, LARGEST_EXTENT = 0.5, 0.95  # of a subject at random, as a part of the new picture


AT_BORDER = 0.01  # a subject that comes so near to a border is cut off by it


SMALLEST_WINDOW = 0.5  # of a background at random, as a part of its edge


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
        thresholds: of the probability, see :func:`~.matting.make_trimap`.

    Returns:
        picture [H, W, 3], its alpha [H, W], and the alpha in the photograph [H, W].

    Raises:
        NoSubjectError, MattingError: there is none, or it cannot be cut out.
        ValueError: pymatting is missing, or the thresholds are not in order.
    """
    height, width = photograph.shape[:2]
    alpha, foreground = matte(photograph, make_trimap(probability, thresholds))
    placement = random_placement(bounding_box(alpha), order)
    window = random_window(background, height, width, order)
    picture, placed = composite(foreground, alpha, window, placement)
    return picture, placed, alpha


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
    return crop_resize(background, height, width, part, order.random(), order.random())
