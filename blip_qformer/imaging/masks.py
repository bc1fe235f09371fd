"""Masks and alpha channels of shape [H, W]: checks, soft edges, and the box around the subject."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: ``(left, top, right, bottom)`` in fractions of the image's width and height, as OpenImages has them.
Box = tuple[float, float, float, float]

OPAQUE = 0.1  # a pixel counts as the subject's above this, as in the preprocessing of masks
MAX_BORDER = 0.95  # no subject covers as much of an image's border


class NoSubjectError(ValueError):
    """An image has no pixel that surely belongs to the subject."""


def check_mask(mask: Tensor) -> None:
    """Refuse a mask that marks nothing, or all but the subject.

    Args:
        mask: A mask of shape [H, W] in 0..1, white where the subject is.

    Raises:
        NoSubjectError: If it is black or white everywhere, or white all along its border.
    """
    is_white = mask > 1 - OPAQUE
    if not (mask > OPAQUE).any() or is_white.all():  # its inverse marks nothing either
        shade = "white" if is_white.any() else "black"
        raise NoSubjectError(
            f"The mask is {shade} everywhere, so it marks no subject: paint the subject white and the rest black, "
            "or leave the mask unconnected."
        )
    border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if (border > 1 - OPAQUE).float().mean() > MAX_BORDER:
        raise NoSubjectError(
            "The mask is white all along the picture's border, so it marks the background: invert the mask."
        )


def blur_mask(mask: Tensor, radius: float) -> Tensor:
    """Blur a mask with a Gaussian, so that its edge becomes about four times as wide as the radius.

    Args:
        mask: A mask of shape [H, W] in 0..1.
        radius: The Gaussian's standard deviation in pixels; 0 leaves the mask as it is.

    Returns:
        A mask of shape [H, W].
    """
    if radius <= 0:
        return mask
    reach = math.ceil(3 * radius)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=mask.device) ** 2) / (2 * radius**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(mask[None, None].float(), (reach,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred[0, 0].clamp(0, 1)


def bounding_box(alpha: Tensor) -> Box:
    """Find the box around everything that is not nearly transparent.

    Args:
        alpha: Opacity of shape [H, W] in 0..1.

    Returns:
        The box in fractions of width and height.

    Raises:
        NoSubjectError: If everything is nearly transparent.
    """
    is_opaque = alpha > OPAQUE
    if not is_opaque.any():
        raise NoSubjectError("Nothing in the picture is opaque, so there is no subject.")
    rows, columns = is_opaque.any(dim=1).nonzero(), is_opaque.any(dim=0).nonzero()
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    height, width = alpha.shape
    return left / width, top / height, right / width, bottom / height
