"""From pixels in 0..1 to Pillow's images."""

from __future__ import annotations

from PIL import Image
from torch import Tensor


def to_pil_image(pixels: Tensor) -> Image.Image:
    """Turn the pixels of one image into Pillow's image, in 8 bits a channel.

    Args:
        pixels: Pixels of shape [H, W, 3] in 0..1, on any device.

    Returns:
        The RGB image.
    """
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy())
