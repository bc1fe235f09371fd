"""Turn images of any size into the normalised square that the vision transformer reads."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

#: CLIP's channel statistics (github.com/openai/CLIP, ``clip/clip.py``).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PreprocessingMode = Literal["crop", "squash", "pad"]
PREPROCESSING_MODES: tuple[str, ...] = get_args(PreprocessingMode)

WHITE = 1.0
SUBJECT_MARGIN = 0.05  # of the subject's longer edge, left free on every side of it
MAX_ASPECT_RATIO = 4  # of an image that is cropped; a longer one loses its ends first


def preprocess(
    images: Tensor,
    mode: PreprocessingMode = "crop",
    mask: Tensor | None = None,
    size: int = 224,
    background: float = WHITE,
) -> Tensor:
    """Turn images as ComfyUI holds them into pixel values as the vision transformer reads them.

    Args:
        images: Images [B, H, W, C] in 0..1 with 1, 3 or 4 channels; a fourth channel is opacity.
        mode: One of :data:`PREPROCESSING_MODES`. ``crop`` fits the short edge and keeps the centre, as in the authors'
            code; ``squash`` fits both edges, as in diffusers; ``pad`` fits the long edge and adds background.
        mask: The subject's opacity [B, H, W], [1, H, W] or [H, W] in 0..1. With a mask, the subject alone is kept, on a
            plain background, and ``mode`` is not used.
        size: Edge of the square, in pixels.
        background: Brightness of the plain background, in 0..1.

    Returns:
        Pixel values [B, 3, size, size], normalised with CLIP's mean and standard deviation.

    Raises:
        ValueError: There is no image, the number of channels is another one, a value is NaN, the mode is unknown, or
            the mask does not fit.
    """
    squares = to_squares(images, mode, mask, size, background)
    mean, std = (squares.new_tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (squares - mean) / std


def to_squares(
    images: Tensor, mode: PreprocessingMode, mask: Tensor | None, size: int, background: float = WHITE
) -> Tensor:
    """Turn images into the squares that the vision transformer reads, before they are normalised.

    Args:
        images: Images, see :func:`preprocess`.
        mode: One of :data:`PREPROCESSING_MODES`.
        mask: The subject's opacity, see :func:`preprocess`.
        size: Edge of the square, in pixels.
        background: Brightness of the plain background, in 0..1.

    Returns:
        Images [B, 3, size, size] in 0..1.

    Raises:
        ValueError: See :func:`preprocess`.
    """
    rgb = _to_8_bit(composite_alpha(_checked(images), background))  # [B, 3, H, W]
    if mask is None:
        return _resize(rgb, mode, size, background)
    subjects = (
        isolate_subject(image, subject_mask, background)
        for image, subject_mask in zip(rgb, fit_mask(mask, images), strict=True)
    )
    return torch.cat([_resize(subject, "squash", size, background) for subject in subjects])


def composite_alpha(images: Tensor, background: float = WHITE) -> Tensor:
    """Put images with opacity on a plain background, and expand grey to three channels.

    Args:
        images: Images [B, H, W, 1, 3 or 4] in 0..1.
        background: Brightness of the background, in 0..1.

    Returns:
        Images [B, 3, H, W].
    """
    channels_first = rearrange(images, "b h w c -> b c h w").float().clamp(0, 1)
    if channels_first.shape[1] == 4:
        rgb, alpha = channels_first.split([3, 1], dim=1)
        return rgb * alpha + background * (1 - alpha)
    return channels_first.expand(-1, 3, -1, -1)


def fit_mask(mask: Tensor, images: Tensor) -> Tensor:
    """Return a mask for each image of a batch, of the images' size.

    Args:
        mask: A mask [B, H, W], [1, H, W], [H, W] or [B, 1, H, W] in 0..1. One of another size but the same aspect
            ratio is scaled.
        images: Images [B, H, W, C].

    Returns:
        Masks [B, H, W] on the images' device.

    Raises:
        ValueError: The number of masks is not that of the images, or the aspect ratio is another one.
    """
    mask = mask.to(images.device, torch.float32).clamp(0, 1)
    if mask.ndim == 4 and mask.shape[1] == 1:  # some nodes keep a channel's axis
        mask = mask[:, 0]
    mask = mask[None] if mask.ndim == 2 else mask
    count, height, width, _ = images.shape
    if mask.ndim != 3 or mask.shape[0] not in (1, count):
        raise ValueError(
            f"The batch holds {count} picture(s) but the mask has the shape {list(mask.shape)}: give one mask for all "
            "pictures, or one for each."
        )
    mask_height, mask_width = mask.shape[1:]
    if abs(mask_width * height - mask_height * width) > 0.02 * mask_height * width:
        raise ValueError(
            f"The mask is {mask_width} x {mask_height} pixels and the picture {width} x {height}, which is another "
            "shape: make the mask from this picture."
        )
    if mask.shape[1:] != (height, width):
        mask = F.interpolate(mask[:, None], size=(height, width), mode="bilinear", antialias=True)[:, 0]
    return mask.expand(count, -1, -1)


def isolate_subject(image: Tensor, mask: Tensor, background: float = WHITE) -> Tensor:
    """Cut a subject out and centre it on a plain square that it nearly fills.

    Args:
        image: An image [3, H, W] in 0..1.
        mask: The subject's opacity [H, W] in 0..1.
        background: Brightness of the square, in 0..1.

    Returns:
        The square [1, 3, S, S].

    Raises:
        ValueError: The mask is black everywhere.
    """
    rows, columns = ((mask > 0.1).any(dim=axis).nonzero() for axis in (1, 0))
    if not len(rows):
        raise ValueError(
            "The mask is black everywhere, so it marks no subject: paint the subject white, invert the mask, "
            "or leave the mask unconnected."
        )
    cutout = image * mask + background * (1 - mask)
    cutout = cutout[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = cutout.shape[1:]
    edge = max(height, width)
    edge += 2 * round(edge * SUBJECT_MARGIN)
    top, left = (edge - height) // 2, (edge - width) // 2
    return F.pad(cutout, (left, edge - width - left, top, edge - height - top), value=background)[None]


def _resize(images: Tensor, mode: str, size: int, background: float) -> Tensor:
    """Resize images [B, 3, H, W] to squares [B, 3, size, size]."""
    if mode == "squash":
        return _interpolate(images, size, size)
    if mode == "pad":
        height, width = _scaled_size(images, size / max(images.shape[-2:]))
        top, left = (size - height) // 2, (size - width) // 2
        borders = (left, size - width - left, top, size - height - top)
        return F.pad(_interpolate(images, height, width), borders, value=background)
    if mode == "crop":
        images = _limit_aspect_ratio(images)
        height, width = _scaled_size(images, size / min(images.shape[-2:]))
        top, left = round((height - size) / 2), round((width - size) / 2)
        return _interpolate(images, height, width)[..., top : top + size, left : left + size]
    raise ValueError(f'There is no preprocessing mode "{mode}": choose one of {", ".join(PREPROCESSING_MODES)}.')


def _scaled_size(images: Tensor, scale: float) -> tuple[int, int]:
    """Return height and width after scaling, truncated to whole pixels as in torchvision, at least one."""
    height, width = (max(1, int(edge * scale + 1e-6)) for edge in images.shape[-2:])
    return height, width


def _limit_aspect_ratio(images: Tensor) -> Tensor:
    """Crop very long images around the centre, so that a strip of 1 x 8000 is not scaled to 224 x 1792000."""
    for axis in (-2, -1):
        longest = MAX_ASPECT_RATIO * min(images.shape[-2:])
        surplus = images.shape[axis] - longest
        if surplus > 1:  # the same at both ends, so that the centre stays where it is
            images = images.narrow(axis, surplus // 2, images.shape[axis] - 2 * (surplus // 2))
    return images


def _interpolate(images: Tensor, height: int, width: int) -> Tensor:
    """Resize with antialiased bicubic interpolation as PIL does: first rows, then columns, rounded after each."""
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = _to_8_bit(F.interpolate(images, size=size, mode="bicubic", antialias=True))
    return images


def _to_8_bit(images: Tensor) -> Tensor:
    """Round to 8 bits, as the references, which resize 8-bit images, do at the same points."""
    return (images.clamp(0, 1) * 255).round() / 255


def _checked(images: Tensor) -> Tensor:
    """Return images that can be preprocessed, or raise ValueError."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise ValueError(
            f"The pictures have the shape {list(images.shape)}, but [batch, height, width, channels] with 1, 3 or 4 "
            "channels is expected: connect an IMAGE."
        )
    if not torch.isfinite(images).all():
        raise ValueError(
            "The pictures hold NaN or infinite values, which nothing can be seen in: look at the node that made them."
        )
    return images
