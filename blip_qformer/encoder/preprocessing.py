"""A picture of any size becomes the square the vision transformer reads."""

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
LONGEST_ASPECT = 4  # a centre crop never sees further than this many short edges


def preprocess(
    images: Tensor,
    mode: PreprocessingMode = "crop",
    mask: Tensor | None = None,
    size: int = 224,
    background: float = WHITE,
) -> Tensor:
    """Pictures as ComfyUI holds them become pixels as the vision transformer reads them.

    Args:
        images: [B, H, W, C] in 0..1 with 1, 3 or 4 channels; a fourth channel is opacity.
        mode: ``crop`` fits the short edge and keeps the centre, as the original does; ``squash`` fits both edges, as
            diffusers does; ``pad`` fits the long edge and fills up with background.
        mask: [B, H, W], [1, H, W] or [H, W], white where the subject is: it alone is kept, on a plain background.
        size: edge of the square, in pixels.
        background: brightness of the plain background, in 0..1.

    Returns:
        [B, 3, size, size], normalised with CLIP's mean and standard deviation.

    Raises:
        ValueError: no picture, another number of channels, NaN, an unknown mode, or a mask that does not fit.
    """
    pictures = _to_8_bit(composite_alpha(_checked(images), background))  # [B, 3, H, W]
    if mask is not None:
        squares = [
            _resize(isolate_subject(picture, subject_mask, background), "squash", size, background)
            for picture, subject_mask in zip(pictures, fit_mask(mask, images), strict=True)
        ]
        pictures = torch.cat(squares)
    else:
        pictures = _resize(pictures, mode, size, background)
    mean, std = (pictures.new_tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (pictures - mean) / std


def composite_alpha(images: Tensor, background: float = WHITE) -> Tensor:
    """[B, H, W, 1, 3 or 4] -> [B, 3, H, W]: grey becomes colour, what is transparent shows the background."""
    pictures = rearrange(images, "b h w c -> b c h w").float().clamp(0, 1)
    if pictures.shape[1] == 4:
        colour, alpha = pictures.split([3, 1], dim=1)
        return colour * alpha + background * (1 - alpha)
    return pictures.expand(-1, 3, -1, -1)


def fit_mask(mask: Tensor, images: Tensor) -> Tensor:
    """A mask for each picture of a batch, each of its picture's size.

    Args:
        mask: [B, H, W], [1, H, W] or [H, W] in 0..1; one of another size but the same shape is scaled.
        images: [B, H, W, C]

    Returns:
        [B, H, W], on the pictures' device.

    Raises:
        ValueError: another number of masks than pictures, or another shape.
    """
    mask = mask.to(images.device, torch.float32).clamp(0, 1)
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


def isolate_subject(picture: Tensor, mask: Tensor, background: float = WHITE) -> Tensor:
    """Cut a subject out and put it into the middle of a plain square that it nearly fills.

    Args:
        picture: [3, H, W] in 0..1; ``mask``: [H, W] in 0..1, the subject's opacity.

    Returns:
        [1, 3, S, S]
    """
    rows, columns = ((mask > 0.1).any(dim=axis).nonzero() for axis in (1, 0))
    if not len(rows):
        raise ValueError(
            "The mask is black everywhere, so it marks no subject: paint the subject white, invert the mask, "
            "or leave the mask unconnected."
        )
    cutout = picture * mask + background * (1 - mask)
    cutout = cutout[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = cutout.shape[1:]
    edge = max(height, width)
    edge += 2 * round(edge * SUBJECT_MARGIN)
    top, left = (edge - height) // 2, (edge - width) // 2
    return F.pad(cutout, (left, edge - width - left, top, edge - height - top), value=background)[None]


def _resize(pictures: Tensor, mode: str, size: int, background: float) -> Tensor:
    """[B, 3, H, W] -> [B, 3, size, size]"""
    if mode == "squash":
        return _interpolate(pictures, size, size)
    if mode == "pad":
        height, width = _scaled(pictures, size / max(pictures.shape[-2:]))
        top, left = (size - height) // 2, (size - width) // 2
        borders = (left, size - width - left, top, size - height - top)
        return F.pad(_interpolate(pictures, height, width), borders, value=background)
    if mode == "crop":
        pictures = _without_far_ends(pictures)
        height, width = _scaled(pictures, size / min(pictures.shape[-2:]))
        top, left = round((height - size) / 2), round((width - size) / 2)
        return _interpolate(pictures, height, width)[..., top : top + size, left : left + size]
    raise ValueError(f'There is no preprocessing mode "{mode}": choose one of {", ".join(PREPROCESSING_MODES)}.')


def _scaled(pictures: Tensor, scale: float) -> tuple[int, int]:
    """Height and width after scaling, cut to whole pixels as torchvision does, at least one."""
    height, width = (max(1, int(edge * scale + 1e-6)) for edge in pictures.shape[-2:])
    return height, width


def _without_far_ends(pictures: Tensor) -> Tensor:
    """Cut a very long picture about its centre, so that a strip of 1 x 8000 is not blown up to 224 x 1792000."""
    for axis in (-2, -1):
        longest = LONGEST_ASPECT * min(pictures.shape[-2:])
        surplus = pictures.shape[axis] - longest
        if surplus > 1:  # cut the same from both ends, so that the centre stays where it is
            pictures = pictures.narrow(axis, surplus // 2, pictures.shape[axis] - 2 * (surplus // 2))
    return pictures


def _interpolate(pictures: Tensor, height: int, width: int) -> Tensor:
    """Bicubic and antialiased, first along the rows and then along the columns, 8-bit after each, as PIL does it."""
    for size in ((pictures.shape[-2], width), (height, width)):
        if pictures.shape[-2:] != size:
            pictures = _to_8_bit(F.interpolate(pictures, size=size, mode="bicubic", antialias=True))
    return pictures


def _to_8_bit(pictures: Tensor) -> Tensor:
    """The references resize 8-bit pictures; rounding where they do keeps our numbers theirs."""
    return (pictures.clamp(0, 1) * 255).round() / 255


def _checked(images: Tensor) -> Tensor:
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
