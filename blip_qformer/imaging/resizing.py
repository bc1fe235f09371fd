"""Resizing and cropping images of shape [H, W, C]."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize an image bilinearly with antialiasing; an image that has the size already is returned as it is.

    Args:
        image: An image of shape [H, W, C].
        height: New height in pixels.
        width: New width in pixels.

    Returns:
        An image of shape [height, width, C].
    """
    if image.shape[:2] == (height, width):
        return image
    channels_first = rearrange(image, "h w c -> 1 c h w")
    resized = F.interpolate(channels_first, size=(height, width), mode="bilinear", antialias=True)
    return rearrange(resized, "1 c h w -> h w c")


def crop_resize(image: Tensor, height: int, width: int, scale: float, x: float, y: float) -> Tensor:
    """Crop a window of a given aspect ratio from an image and resize it.

    Args:
        image: An image of shape [H, W, C].
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        scale: Edge of the window relative to the largest window that fits, in 0..1.
        x: Position of the window in the space that is left, from 0, at the left, to 1.
        y: Position of the window in the space that is left, from 0, at the top, to 1.

    Returns:
        An image of shape [height, width, C].
    """
    full_height, full_width = image.shape[:2]
    ratio = min(full_height / height, full_width / width) * scale
    window_height, window_width = max(1, round(height * ratio)), max(1, round(width * ratio))
    top, left = round((full_height - window_height) * y), round((full_width - window_width) * x)
    return resize(image[top : top + window_height, left : left + window_width], height, width)


def center_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Crop the largest centred window of a given aspect ratio from an image and resize it.

    Args:
        image: An image of shape [H, W, C].
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        An image of shape [height, width, C].
    """
    return crop_resize(image, height, width, scale=1.0, x=0.5, y=0.5)
