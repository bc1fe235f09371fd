"""Local blend: an edit is kept to where a word looks (arXiv 2208.01626, section 4, and its published code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import per_position

Looking = tuple[Tensor, Tensor]  # query [B, N, heads * d] and key [B, T, heads * d] of a layer


def word_maps(query: Tensor, key: Tensor, columns: Tensor, heads: int) -> Tensor:
    """How much each place looks at words: the mean over heads of A @ columns, for a few columns.

    Args:
        query: [B, N, heads * d], a layer's places; key: [B, T, heads * d].
        columns: [T, W], for each word how much every token counts.

    Returns:
        [B, W, N], float32.
    """
    query, key = (each.unflatten(-1, (heads, -1)).transpose(1, 2).float() for each in (query, key))
    probabilities = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return (probabilities @ columns.to(probabilities)).mean(dim=1).transpose(1, 2)


def edited_word_maps(source: Looking, edited: Looking, lent: Tensor, own: Tensor | None, heads: int) -> Tensor:
    """The maps of an edit whose attention is partly its source's.

    Args:
        lent: [tokens, W], columns for the source's attention.
        own: [tokens, 1], for the edit's own and the last of the words; None: nothing.

    Returns:
        [B, W, N], float32.
    """
    maps = word_maps(*source, _columns(lent, source[1]), heads)
    if own is not None:
        maps[:, -1:] += word_maps(*edited, _columns(own, edited[1]), heads)
    return maps


def blend_mask(maps: Sequence[Tensor], size: tuple[int, int], threshold: float) -> Tensor:
    """Where an edit is kept: where the map of any word passes a threshold.

    Args:
        maps: each [B, h, w], added up over layers and steps.
        size: of the latent, rows and columns.
        threshold: a part of a map's own maximum.

    Returns:
        [B, H, W], bool.
    """
    masks = []
    for each in maps:
        spread = F.max_pool2d(each[:, None], kernel_size=3, stride=1, padding=1)
        resized = F.interpolate(spread, size=size)[:, 0]  # nearest
        masks.append(resized > threshold * resized.amax(dim=(1, 2), keepdim=True))
    return torch.stack(masks).any(dim=0)


def blend(source: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """The edit inside the mask and the source outside.

    Args:
        source, edited: [B, C, H, W]; mask: [B, H, W]
    """
    return torch.where(mask[:, None], edited, source)


def _columns(per_token: Tensor, key: Tensor) -> Tensor:
    """[tokens, W] -> [T, W]"""
    return per_position(per_token.T, key.shape[1], outside=0.0).T
