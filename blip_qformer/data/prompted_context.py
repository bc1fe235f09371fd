"""Prompted context generation: a subject on another background (arXiv 2305.14720, section 4.1).

The subject is cut out of its photograph and composited onto another background. From that image the model learns to
generate the photograph, so it cannot learn to copy the background.
"""

from __future__ import annotations

import random

from torch import Tensor

from ..imaging.compositing import Placement, composite
from ..imaging.masks import Box, bounding_box
from ..imaging.matting import THRESHOLDS, make_trimap, matte
from ..imaging.resizing import crop_resize

SMALLEST_EXTENT, LARGEST_EXTENT = 0.5, 0.95  # of the subject's longer edge, in fractions of the image
BORDER_MARGIN = 0.01  # a subject that comes this near to a border is cut off by it
SMALLEST_WINDOW = 0.5  # of the background's window, in fractions of the largest one's edge


def subject_in_context(
    photograph: Tensor,
    probability: Tensor,
    background: Tensor,
    rng: random.Random,
    thresholds: tuple[float, float] = THRESHOLDS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Composite a photograph's subject onto a background, at a random position and size.

    The subject's longer edge becomes 50 to 95 % of the image's, and all of it is inside: at a border if the photograph
    cuts it off there, else anywhere. The background is a window of the photograph's shape, whose edge is 50 to 100 % of
    the largest one's.

    Args:
        photograph: The photograph of shape [H, W, 3] in 0..1.
        probability: The subject's probability of shape [H, W].
        background: The background of shape [h, w, 3] in 0..1.
        rng: The source of everything random.
        thresholds: Probability up to which a pixel is background, and from which on it is subject.

    Returns:
        The image [H, W, 3], its alpha [H, W], and the alpha in the photograph [H, W].

    Raises:
        NoSubjectError: Nothing is probable enough.
        MattingError: The subject cannot be cut out.
        ValueError: pymatting is missing, or the thresholds are not in order.
    """
    height, width = photograph.shape[:2]
    alpha, foreground = matte(photograph, make_trimap(probability, thresholds))
    placement = random_placement(bounding_box(alpha), rng)
    window = random_window(background, height, width, rng)
    image, image_alpha = composite(foreground, alpha, window, placement)
    return image, image_alpha, alpha


def random_placement(extent: Box, rng: random.Random) -> Placement:
    """Choose a random placement that keeps all of a subject inside an image of the photograph's shape.

    A subject that the photograph's border cuts off stays at that border: elsewhere it would float in the air.

    Args:
        extent: The box around the subject in the photograph.
        rng: The source of the placement.

    Returns:
        The placement.
    """
    left, top, right, bottom = extent
    scale = rng.uniform(SMALLEST_EXTENT, LARGEST_EXTENT) / max(right - left, bottom - top)
    shifts = []
    for start, end in ((left, right), (top, bottom)):
        free = 1 - (end - start) * scale
        offset = rng.uniform(-free / 2, free / 2)  # of the subject's middle from the image's
        is_cut_at_start, is_cut_at_end = start < BORDER_MARGIN, end > 1 - BORDER_MARGIN
        if is_cut_at_start != is_cut_at_end:
            offset = free / 2 if is_cut_at_end else -free / 2
        shifts.append(offset - ((start + end) / 2 - 0.5) * scale)
    return Placement(scale, *shifts)


def random_window(background: Tensor, height: int, width: int, rng: random.Random) -> Tensor:
    """Crop a random window of a background and scale it.

    Args:
        background: The background of shape [h, w, 3].
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        rng: The source of the window's size and position.

    Returns:
        The window, scaled to [height, width, 3].
    """
    fraction = rng.uniform(SMALLEST_WINDOW, 1.0)
    return crop_resize(background, height, width, fraction, rng.random(), rng.random())
