"""Subject on Background: subjects cut out of a batch one by one, and put onto backgrounds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import comfy.model_management
import comfy.utils
import torch
from einops import rearrange
from torch import Tensor

from ...blip_qformer.encoder.preprocessing import composite_alpha, fit_mask
from ...blip_qformer.imaging.compositing import Placement, composite
from ...blip_qformer.imaging.masks import blur_mask, check_mask
from ...blip_qformer.imaging.matting import make_trimap, matte
from ...blip_qformer.imaging.resizing import center_crop
from .managed import ManagedSegmenter

#: A subject's colours [H, W, 3] and opacity [H, W].
CutOut = tuple[Tensor, Tensor]


def drop_alpha(images: Tensor) -> Tensor:
    """Put transparent images on white.

    Args:
        images: Images of shape [B, H, W, C] in 0..1, grey, RGB or RGBA.

    Returns:
        Images of shape [B, H, W, 3].
    """
    return rearrange(composite_alpha(images), "b c h w -> b h w c")


def cut_out_by_mask(images: Tensor, mask: Tensor, blur_radius: float) -> Iterator[CutOut]:
    """Cut out the subjects that masks mark; the masks become their opacity.

    Args:
        images: Images of shape [B, H, W, 3] in 0..1.
        mask: Masks of shape [B, H, W] or [1, H, W], white where the subject is.
        blur_radius: How far a mask's edge is blurred, in pixels.

    Raises:
        ValueError: A mask does not fit its image, or marks no subject.
    """
    for each in mask.reshape(-1, *mask.shape[-2:]):
        check_mask(each)
    for image, alpha in zip(images, fit_mask(mask, images), strict=True):
        yield image, blur_mask(alpha, blur_radius)


def cut_out_by_word(
    images: Tensor, word: str, segmenter: ManagedSegmenter, thresholds: tuple[float, float], longest_side: int
) -> Iterator[CutOut]:
    """Cut out the subjects that a word names; can be cancelled.

    Args:
        images: Images of shape [B, H, W, 3] in 0..1.
        word: What to cut out.
        segmenter: Model that finds it.
        thresholds: Probabilities up to which a pixel is background, and from which on it is subject.
        longest_side: Longer side in pixels at which the edge between them is found.

    Raises:
        ValueError: The word is empty, there is no such subject, or pymatting is missing.
    """
    if not word.strip():
        raise ValueError("The subject word is empty: write what is to be cut out, such as dog, or connect a mask.")
    for image in images:
        comfy.model_management.throw_exception_if_processing_interrupted()
        trimap = make_trimap(segmenter(image, word.strip()), thresholds)
        on_step = comfy.model_management.throw_exception_if_processing_interrupted
        alpha, foreground = matte(image, trimap, longest_side, on_step)
        yield foreground, alpha


def composite_batch(
    images: Tensor, cut_outs: Iterator[CutOut], backgrounds: Tensor, placement: Placement, size_of_images: bool
) -> tuple[Tensor, Tensor]:
    """Put a batch of subjects onto a batch of backgrounds, with a progress bar; a batch of one serves for all.

    Args:
        images: Images of shape [B, H, W, 3] that the subjects are cut out of.
        cut_outs: The subject of each image.
        backgrounds: Backgrounds of shape [B', h, w, C].
        placement: Where in the background an image lies.
        size_of_images: Whether backgrounds are cropped to the images' size.

    Returns:
        Images of shape [N, h, w, 3], and the subject's opacity in them [N, h, w].

    Raises:
        ValueError: There are several of both, and not as many of one as of the other.
    """
    backgrounds = drop_alpha(backgrounds).to(images.device)
    count = max(len(images), len(backgrounds))
    if len(images) != len(backgrounds) and 1 not in (len(images), len(backgrounds)):
        raise ValueError(
            f"There are {len(images)} pictures and {len(backgrounds)} backgrounds: give as many of one as of the "
            "other, or a single one of either."
        )
    if size_of_images:
        backgrounds = torch.stack([center_crop(each, *images.shape[1:3]) for each in backgrounds])
    if len(images) == 1:
        cut_outs = repeat(next(cut_outs))
    progress = comfy.utils.ProgressBar(count)
    composites = []
    for index, (foreground, alpha) in zip(range(count), cut_outs, strict=False):
        comfy.model_management.throw_exception_if_processing_interrupted()
        composites.append(composite(foreground, alpha, backgrounds[index % len(backgrounds)], placement))
        progress.update(1)
    new_images, masks = (torch.stack(each) for each in zip(*composites, strict=True))
    return new_images, masks
