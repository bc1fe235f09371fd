"""Local blend: an edit is kept to where a word attends (arXiv 2208.01626, section 4), or to a soft mask.

The steps are those of the paper's published code, ``LocalBlend`` in github.com/google/prompt-to-prompt. A soft mask
counts in each prediction of the model, and the latents between these are the source's where it is 0. If it counted in
both, a half of it would be a quarter after one step, and its soft edge would be gone after a few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import per_position

QueryAndKey = tuple[Tensor, Tensor]  # of a layer: query [B, N, heads * d] and key [B, T, heads * d]


def word_maps(query: Tensor, key: Tensor, columns: Tensor, heads: int) -> Tensor:
    """Compute how much each query attends to words: the mean over the heads of A @ columns, for a few columns.

    Args:
        query: Queries of a layer, of shape [B, N, heads * d].
        key: Keys of the layer, of shape [B, T, heads * d].
        columns: For each word the factor of every token, of shape [T, W].
        heads: Number of attention heads.

    Returns:
        Maps of shape [B, W, N], float32.
    """
    query, key = (each.unflatten(-1, (heads, -1)).transpose(1, 2).float() for each in (query, key))  # [B, heads, N, d]
    probabilities = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)  # [B, heads, N, T]
    return (probabilities @ columns.to(probabilities)).mean(dim=1).transpose(1, 2)


def edited_word_maps(
    source: QueryAndKey, edited: QueryAndKey, source_columns: Tensor, edited_columns: Tensor | None, heads: int
) -> Tensor:
    """Compute the maps of an edited image whose attention is partly its source's.

    Args:
        source: The source's query and key.
        edited: The edited image's own query and key.
        source_columns: Columns for the source's attention, of shape [tokens, W].
        edited_columns: Columns for the edited image's own attention and the last of the words, of shape [tokens, 1];
            None if it adds nothing.
        heads: Number of attention heads.

    Returns:
        Maps of shape [B, W, N], float32.
    """
    maps = word_maps(*source, _repeat_columns(source_columns, source[1]), heads)
    if edited_columns is not None:
        maps[:, -1:] += word_maps(*edited, _repeat_columns(edited_columns, edited[1]), heads)
    return maps


def blend_mask(maps: Sequence[Tensor], size: tuple[int, int], threshold: float) -> Tensor:
    """Mark where an edit is kept: where the map of any word passes a threshold.

    Args:
        maps: The maps of each word, each of shape [B, h, w], summed over layers and steps.
        size: Height and width of the latents.
        threshold: Threshold relative to a map's own maximum.

    Returns:
        A boolean mask of shape [B, H, W].
    """
    masks = []
    for each in maps:
        dilated = F.max_pool2d(each[:, None], kernel_size=3, stride=1, padding=1)
        resized = F.interpolate(dilated, size=size)[:, 0]  # nearest, [B, H, W]
        masks.append(resized > threshold * resized.amax(dim=(1, 2), keepdim=True))
    return torch.stack(masks).any(dim=0)


def blend_predictions(source: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """Mix predictions of an edited image and its source by a mask.

    Args:
        source: Predictions of shape [B, C, H, W].
        edited: Predictions of shape [B, C, H, W].
        mask: A mask of shape [B, H, W], boolean or in 0..1.

    Returns:
        Predictions of shape [B, C, H, W]: the source's where the mask is 0, to the last bit, and the edited image's
        where it is 1.
    """
    return blend_latents(source, torch.lerp(source, edited, mask[:, None].to(source)), mask)


def blend_latents(source: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """Combine the edited latents wherever a mask is not 0 with the source's elsewhere.

    Args:
        source: Latents of shape [B, C, H, W].
        edited: Latents of shape [B, C, H, W].
        mask: A mask of shape [B, H, W], boolean or in 0..1.

    Returns:
        Latents of shape [B, C, H, W].
    """
    return torch.where(mask[:, None] > 0, edited, source)


def _repeat_columns(columns: Tensor, key: Tensor) -> Tensor:
    """Repeat columns [tokens, W] for every copy of the prompt in a key -> [T, W]."""
    return per_position(columns.T, key.shape[1], outside=0.0).T
