"""Where each word of a prompt attends while an image is sampled: cross-attention, averaged over a run.

As in arXiv 2210.04885 (DAAM): averaged over all heads, cross-attention layers and calls of the model, the coarse layers
enlarged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..encoder.preprocessing import composite_alpha
from ..prompt import TokenSpan
from .words import find_phrase, readable


class Area(NamedTuple):
    """A rectangle of the latents, in the latents' pixels.

    Args:
        height: Height of the rectangle.
        width: Width of the rectangle.
        top: Distance from the upper edge.
        left: Distance from the left edge.
    """

    height: int
    width: int
    top: int
    left: int


@dataclass
class LayerSum:
    """The summed maps of all layers of one size.

    Args:
        maps: Sum of the maps, of shape [B, tokens, h, w].
        count: Number of maps in the sum.
    """

    maps: Tensor
    count: int = 1


class AttentionRecord:
    """The cross-attention of one sampling run, token by token.

    Args:
        prompts: For each of the recorded conditionings, its words in order.
    """

    def __init__(self, prompts: Sequence[Sequence[TokenSpan]]) -> None:
        self.prompts = tuple(tuple(spans) for spans in prompts)
        self.start(0, 0)

    def start(self, height: int, width: int) -> None:
        """Forget everything at the start of a run.

        Args:
            height: Height of the run's latents.
            width: Width of the run's latents.
        """
        self._size = (height, width)
        self._sums: dict[tuple[int, Area, int, int], LayerSum] = {}

    def add(self, prompt: int, maps: Tensor, area: Area | None = None) -> None:
        """Add the attention of one layer in one call of the model.

        Args:
            prompt: Index in ``prompts``.
            maps: Maps of shape [B, tokens, h, w], as :func:`mean_attention` gives them.
            area: The part of the latents that the maps show; None means all.
        """
        height, width = maps.shape[-2:]
        key = (prompt, area or Area(*self._size, 0, 0), height, width)
        if key in self._sums:
            self._sums[key].maps += maps
            self._sums[key].count += 1
        else:
            self._sums[key] = LayerSum(maps.clone())

    def finish(self) -> None:
        """Move the maps to the CPU at the end of a run."""
        for layer in self._sums.values():
            layer.maps = layer.maps.cpu()

    @property
    def batch_size(self) -> int:
        """Number of images in the run; 0 if nothing is recorded."""
        return max((len(layer.maps) for layer in self._sums.values()), default=0)

    def words(self) -> list[str]:
        """List every word of the prompts once, as people spell it."""
        words = (readable(span.word) for spans in self.prompts for span in spans)
        return [word for word in dict.fromkeys(words) if any(letter.isalnum() for letter in word)]

    def word_map(self, phrase: str, height: int, width: int) -> Tensor:
        """Compute the share of the attention that goes to a phrase, summed over its tokens.

        Args:
            phrase: A phrase, see :func:`~.words.find_phrase`.
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Returns:
            A map of shape [B, height, width] in 0..1; the attention of a pixel to all tokens is 1.

        Raises:
            ValueError: If no prompt has the phrase.
        """
        positions = _find_in_prompts(self.prompts, phrase)
        total, count = torch.zeros(self.batch_size, height, width), torch.zeros(height, width)
        for (prompt, area, _, _), layer in self._sums.items():
            if prompt not in positions:
                continue
            maps = layer.maps[:, list(positions[prompt])].sum(dim=1, keepdim=True)  # [B, 1, h, w]
            rows, columns = _area_in_pixels(area, self._size, height, width)
            size = (rows.stop - rows.start, columns.stop - columns.start)
            total[:, rows, columns] += F.interpolate(maps, size=size, mode="bilinear")[:, 0]
            count[rows, columns] += layer.count
        return total / count.clamp_min(1)


def mean_attention(query: Tensor, key: Tensor, heads: int, tokens: int) -> Tensor:
    """Compute softmax(Q K' / sqrt d), averaged over the heads.

    Args:
        query: Queries of shape [B, N, heads * d].
        key: Keys of shape [B, n * tokens, heads * d]; ComfyUI repeats a prompt when it runs beside a longer one.
        heads: Number of attention heads.
        tokens: Number of tokens of the prompt itself; the attention to its repetitions is added.

    Returns:
        Maps of shape [B, tokens, N], float32.
    """
    query, key = (rearrange(each.float(), "b n (h d) -> h b n d", h=heads) for each in (query, key))
    attention = torch.zeros((), device=query.device)
    for q, k in zip(query, key, strict=True):  # one head at a time: all together need as much memory as the model
        attention = attention + (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return rearrange(attention / heads, "b q (n tokens) -> b n tokens q", tokens=tokens).sum(dim=1)


def to_heatmap(word_map: Tensor) -> Tensor:
    """Stretch each map to 0..1; a constant map becomes 0.

    Args:
        word_map: Maps of shape [B, H, W].

    Returns:
        Heatmaps of shape [B, H, W] in 0..1.
    """
    minimum, maximum = word_map.amin(dim=(1, 2), keepdim=True), word_map.amax(dim=(1, 2), keepdim=True)
    return (word_map - minimum) / (maximum - minimum).clamp_min(torch.finfo(word_map.dtype).tiny)


def overlay_heatmap(images: Tensor, heatmap: Tensor, strength: float) -> Tensor:
    """Blend images with a heatmap, coloured from black over red and yellow to white.

    Args:
        images: Images of shape [B, H, W, 1, 3 or 4] in 0..1.
        heatmap: Heatmaps of shape [B, H, W] in 0..1.
        strength: Opacity of the heatmap; 0 leaves the images as they are.

    Returns:
        Images of shape [B, H, W, 3].
    """
    rgb = rearrange(composite_alpha(images), "b c h w -> b h w c")
    colours = torch.stack([3 * heatmap, 3 * heatmap - 1, 3 * heatmap - 2], dim=-1).clamp(0, 1)
    return rgb + strength * (colours - rgb)


def _find_in_prompts(prompts: Sequence[Sequence[TokenSpan]], phrase: str) -> dict[int, tuple[int, ...]]:
    """A phrase's positions in each prompt that has it.

    Raises:
        ValueError: If none has it.
    """
    found: dict[int, tuple[int, ...]] = {}
    missing: ValueError | None = None
    for index, spans in enumerate(prompts):
        try:
            found[index] = find_phrase(spans, phrase)
        except ValueError as error:
            missing = error
    if missing is not None and not found:
        raise missing
    return found


def _area_in_pixels(area: Area, latent_size: tuple[int, int], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the image that show an area of the latents; at least one pixel."""

    def to_pixels(start: int, length: int, latent_edge: int, edge: int) -> slice:
        first = min(round(start * edge / latent_edge), edge - 1)
        end = min(start + length, latent_edge)  # the host lets an area extend beyond the edge
        return slice(first, max(round(end * edge / latent_edge), first + 1))

    rows = to_pixels(area.top, area.height, latent_size[0], height)
    return rows, to_pixels(area.left, area.width, latent_size[1], width)
