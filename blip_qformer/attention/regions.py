"""Regions of an image that attend to prompts of their own, in one call of the U-Net.

In each cross-attention layer, the output of a pixel is a weighted mean over the scene's prompt (number 0) and the
regions' (from 1 on):

    sum over r of weight_r(pixel) * attend(query, key_r, values_r)

An attention is computed only for the pixels where its weight is not zero: however many regions share an image, they
cost about one attention. The weights are made once for the latents, and averaged for the layers below them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .edits import Box, Region
from .injection import Attend, ConditioningRows, attend_twice, edit_cross
from .plan import StepPlan

ROUNDING = 1e-5  # what a feathered mask misses of 0 and of 1 by the rounding of its sums


class PixelWeights(NamedTuple):
    """The weights of one prompt in the layers of one size.

    Args:
        weights: Weights of shape [B or 1, pixels].
        pixels: Indices of the pixels whose weight is not zero in every image, of shape [pixels]; None means all.
    """

    weights: Tensor
    pixels: Tensor | None


class RegionAttention(NamedTuple):
    """The attention to one prompt.

    Args:
        key: Projected keys of shape [B, T, C]; T may be another one for each prompt.
        values: Projected values of shape [B, T, C].
        weights: Where it counts, and how much.
        plan: What edits do to it.
    """

    key: Tensor
    values: Tensor
    weights: PixelWeights
    plan: StepPlan


def attend_regions(query: Tensor, attentions: Sequence[RegionAttention], group_size: int, attend: Attend) -> Tensor:
    """Compute the cross-attention of one conditioning whose regions have prompts of their own.

    Args:
        query: Projected queries of shape [B, N, C], before any edit.
        attentions: The scene's attention and those of the regions.
        group_size: Number of images in a group, a source and its edited images; 1 without such.
        attend: The attention.

    Returns:
        Output of the attention, of shape [B, N, C].
    """
    rows = ConditioningRows(0, len(query), group_size)
    attended = torch.zeros_like(query)
    for key, values, (weights, pixels), plan in attentions:
        if not weights.shape[1]:
            continue
        own_query = query if pixels is None else query[:, pixels]
        output = attend_planned(own_query, key, values, rows, plan, attend) * weights[..., None].to(query)
        attended = attended + output if pixels is None else attended.index_add(1, pixels, output)
    return attended


def attend_planned(
    query: Tensor, key: Tensor, values: Tensor, rows: ConditioningRows, plan: StepPlan, attend: Attend
) -> Tensor:
    """Compute an attention with its edits.

    Args:
        query: Projected queries of shape [B, N, C].
        key: Projected keys of shape [B, T, C].
        values: Projected values of shape [B, T, C].
        rows: The rows that the edits are for.
        plan: What the edits do.
        attend: The attention.

    Returns:
        Output of the attention, of shape [B, N, C].
    """
    planned = [(rows, plan)]
    edited = edit_cross(query, key, values, planned)
    return attend_twice(*edited, planned, attend) if plan.needs_two_attentions else attend(*edited)


def region_weights(regions: Sequence[Region], height: int, width: int) -> Tensor:
    """Compute how the scene and the regions share the pixels of an image.

    The coverage of a region is its feathered mask times its strength. Where coverages add up to more than 1, the
    regions share by them; what they leave of 1 is the scene's, and so is the base share of each.

    Args:
        regions: The regions.
        height: Height of the latents.
        width: Width of the latents.

    Returns:
        Weights of shape [1 + regions, B, height, width], the scene's first, that add up to 1 in every pixel; B is the
        largest number of masks that a region has.
    """
    coverages = [region_mask(region, height, width) * region.strength for region in regions]
    batch_size = max(map(len, coverages), default=1)
    stacked = torch.stack([_repeat_rows(each, batch_size) for each in coverages])  # [regions, B, height, width]
    shares = torch.tensor([1 - region.base_share for region in regions])[:, None, None, None]
    weights = stacked / stacked.sum(dim=0).clamp_min(1) * shares
    scene = (1 - weights.sum(dim=0)).clamp_min(0)
    scene = torch.where(scene < ROUNDING, 0, scene)  # a remainder of rounding would cost a whole attention
    return torch.cat([scene[None], weights])


def region_mask(region: Region, height: int, width: int) -> Tensor:
    """Return where a region is in latents of some size, with its soft edge.

    Args:
        region: The region.
        height: Height of the latents.
        width: Width of the latents.

    Returns:
        Masks of shape [B or 1, height, width] in 0..1.
    """
    if isinstance(region.mask, Box):
        mask = box_mask(region.mask, height, width)
    else:
        mask = resize_mask(region.mask.float().cpu(), height, width).clamp(0, 1)
    return feather_mask(mask, region.feather * min(height, width))


def regions_mask(regions: Sequence[Region], height: int, width: int) -> Tensor:
    """Compute which part of each pixel lies in any of some regions, soft edges included.

    Masks that meet add up, so that no seam is left between two regions side by side. Strengths do not count: a weak
    region is as large as a strong one.

    Args:
        regions: The regions, at least one.
        height: Height of the latents.
        width: Width of the latents.

    Returns:
        Masks of shape [B, height, width] in 0..1; B is the largest number of masks that a region has.
    """
    masks = [region_mask(region, height, width) for region in regions]
    batch_size = max(map(len, masks))
    total = torch.stack([_repeat_rows(mask, batch_size) for mask in masks]).sum(dim=0)
    return torch.where(total > 1 - ROUNDING, 1, total)


def box_mask(box: Box, height: int, width: int) -> Tensor:
    """Return how much of each pixel a box covers.

    Args:
        box: The box.
        height: Height of the mask.
        width: Width of the mask.

    Returns:
        A mask of shape [1, height, width] in 0..1.
    """
    rows = _covered(box.y, box.height, height)
    columns = _covered(box.x, box.width, width)
    return (rows[:, None] * columns)[None]


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize masks by the mean over the area of each pixel; masks of zeros and of ones stay what they are.

    Args:
        mask: Masks of shape [B, H, W].
        height: New height.
        width: New width.

    Returns:
        Masks of shape [B, height, width].
    """
    return F.interpolate(mask[:, None], size=(height, width), mode="area")[:, 0]


def feather_mask(mask: Tensor, feather: float) -> Tensor:
    """Give masks a soft edge: a Gaussian blur that does not reach farther than half of its width.

    Args:
        mask: Masks of shape [B, H, W] in 0..1. Beyond the edge of the image they go on as they are at it.
        feather: Width of the soft edge in pixels, four standard deviations.

    Returns:
        Masks of shape [B, H, W] in 0..1.
    """
    reach = int(feather / 2)
    if reach < 1:
        return mask
    offsets = torch.arange(-reach, reach + 1, dtype=mask.dtype)
    kernel = (-0.5 * (offsets / (feather / 4)) ** 2).exp()
    kernel = kernel / kernel.sum()
    blurred = mask[:, None]
    for shape, padding in (((-1, 1), (0, 0, reach, reach)), ((1, -1), (reach, reach, 0, 0))):
        padded = F.pad(blurred, padding, mode="replicate")
        blurred = F.conv2d(padded, kernel.view(1, 1, *shape))
    blurred = torch.where(blurred < ROUNDING, 0, blurred)
    return torch.where(blurred > 1 - ROUNDING, 1, blurred)[:, 0]


def pixel_weights(weights: Tensor, size: tuple[int, int]) -> list[PixelWeights]:
    """Average weights for the layers of one size, and note which pixels have any.

    Args:
        weights: Weights of shape [prompts, B, H, W].
        size: Height and width of the layers' maps.

    Returns:
        The weights of each prompt.
    """
    averaged = F.interpolate(weights, size=size, mode="area").flatten(2)  # [prompts, B, pixels]
    found = []
    for each in averaged:
        is_used = each.any(dim=0)
        pixels = None if is_used.all() else is_used.nonzero()[:, 0]
        found.append(PixelWeights(each if pixels is None else each[:, pixels], pixels))
    return found


def _covered(start: float, length: float, count: int) -> Tensor:
    """How much of each of ``count`` pixels lies between two fractions of an edge, of shape [count]."""
    first, end = start * count, (start + length) * count
    edges = torch.arange(count + 1, dtype=torch.float64).clamp(first, max(first, end))
    covered = edges.diff()
    return torch.where(covered > 1 - ROUNDING, 1, torch.where(covered < ROUNDING, 0, covered)).float()


def _repeat_rows(mask: Tensor, count: int) -> Tensor:
    """Repeat masks [B, H, W] for more images than they have -> [count, H, W]."""
    return mask.repeat(-(-count // len(mask)), 1, 1)[:count]
