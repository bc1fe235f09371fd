"""Where each word of a prompt looked while a picture was drawn: cross-attention, averaged over a run.

As arXiv 2210.04885 does it: over all heads, cross-attention layers and calls of the model, the coarse layers enlarged.
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
    """A part of a latent, or all of it, in the latent's pixels."""

    height: int
    width: int
    top: int
    left: int


@dataclass
class LayerSum:
    """The maps of all layers of one size, [B, tokens, h, w], and how many they are."""

    maps: Tensor
    count: int = 1


class AttentionRecord:
    """The cross-attention of one sampling run, token by token.

    Args:
        prompts: for each of the conditionings that are watched, its words in order.
    """

    def __init__(self, prompts: Sequence[Sequence[TokenSpan]]) -> None:
        self.prompts = tuple(tuple(spans) for spans in prompts)
        self.start(0, 0)

    def start(self, height: int, width: int) -> None:
        """Forget what was recorded; a run on latents of this size begins."""
        self._size = (height, width)
        self._sums: dict[tuple[int, Area, int, int], LayerSum] = {}

    def add(self, prompt: int, maps: Tensor, area: Area | None = None) -> None:
        """Add one layer's attention in one call of the model.

        Args:
            prompt: which of ``prompts``.
            maps: [B, tokens, h, w], as :func:`mean_attention` gives it.
            area: what of the latents the maps show; None: all.
        """
        key = (prompt, area or Area(*self._size, 0, 0), *maps.shape[-2:])
        if key in self._sums:
            self._sums[key].maps += maps
            self._sums[key].count += 1
        else:
            self._sums[key] = LayerSum(maps.clone())

    def finish(self) -> None:
        """Let the device go that the run was on."""
        for layer in self._sums.values():
            layer.maps = layer.maps.cpu()

    @property
    def rows(self) -> int:
        """How many pictures were drawn; 0: nothing is recorded."""
        return max((len(layer.maps) for layer in self._sums.values()), default=0)

    def words(self) -> list[str]:
        """Every word of the prompts once, as people spell it."""
        words = (readable(span.word) for spans in self.prompts for span in spans)
        return [word for word in dict.fromkeys(words) if any(letter.isalnum() for letter in word)]

    def word_map(self, phrase: str, height: int, width: int) -> Tensor:
        """How much a phrase was looked at: its tokens' part of the attention, summed over them.

        Args:
            phrase: as in :func:`~.words.find_phrase`.
            height, width: of the picture, in pixels.

        Returns:
            [B, height, width] in 0..1; the attention of one place on all tokens is 1.

        Raises:
            ValueError: no prompt has the phrase.
        """
        positions = _find_in_prompts(self.prompts, phrase)
        total, count = torch.zeros(self.rows, height, width), torch.zeros(height, width)
        for (prompt, area, _, _), layer in self._sums.items():
            if prompt not in positions:
                continue
            maps = layer.maps[:, list(positions[prompt])].sum(dim=1, keepdim=True)  # [B, 1, h, w]
            rows, columns = _scaled(area, self._size, height, width)
            size = (rows.stop - rows.start, columns.stop - columns.start)
            total[:, rows, columns] += F.interpolate(maps, size=size, mode="bilinear")[:, 0]
            count[rows, columns] += layer.count
        return total / count.clamp_min(1)


def mean_attention(query: Tensor, key: Tensor, heads: int, tokens: int) -> Tensor:
    """softmax(Q K' / sqrt d), averaged over the heads.

    Args:
        query: [B, places, heads * d]
        key: [B, n * tokens, heads * d]; ComfyUI repeats a prompt when it runs beside a longer one.
        tokens: of the prompt itself; what is said again is added to it.

    Returns:
        [B, tokens, places], float32.
    """
    query, key = (rearrange(each.float(), "b n (h d) -> h b n d", h=heads) for each in (query, key))
    attention = torch.zeros((), device=query.device)
    for q, k in zip(query, key, strict=True):  # one head at a time: all together need as much memory as the model
        attention = attention + (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return rearrange(attention / heads, "b places (n tokens) -> b n tokens places", tokens=tokens).sum(dim=1)


def heat(word_map: Tensor) -> Tensor:
    """[B, H, W] -> the same from 0 where a picture has the least to 1 where it has the most; 0 if it is all alike."""
    least, most = word_map.amin(dim=(1, 2), keepdim=True), word_map.amax(dim=(1, 2), keepdim=True)
    return (word_map - least) / (most - least).clamp_min(torch.finfo(word_map.dtype).tiny)


def overlay(pictures: Tensor, heat: Tensor, strength: float) -> Tensor:
    """Let pictures glow, black over red and yellow to white, where the heat is.

    Args:
        pictures: [B, H, W, 1, 3 or 4] in 0..1
        heat: [B, H, W] in 0..1
        strength: how much of the glow is mixed in; 0: the pictures as they are.

    Returns:
        [B, H, W, 3]
    """
    colour = rearrange(composite_alpha(pictures), "b c h w -> b h w c")
    glow = torch.stack([3 * heat, 3 * heat - 1, 3 * heat - 2], dim=-1).clamp(0, 1)
    return colour + strength * (glow - colour)


def _find_in_prompts(prompts: Sequence[Sequence[TokenSpan]], phrase: str) -> dict[int, tuple[int, ...]]:
    """A phrase's positions in each prompt that has it.

    Raises:
        ValueError: none has it.
    """
    found = {}
    for index, spans in enumerate(prompts):
        try:
            found[index] = find_phrase(spans, phrase)
        except ValueError as error:
            missing = error
    if not found:
        raise missing
    return found


def _scaled(area: Area, latent: tuple[int, int], height: int, width: int) -> tuple[slice, slice]:
    """A part of a latent as rows and columns of the picture; at least one pixel."""
    slices = []
    for start, length, edge, pixels in zip(area[2:], area[:2], latent, (height, width), strict=True):
        first = min(round(start * pixels / edge), pixels - 1)
        end = min(start + length, edge)  # the host lets an area hang over
        slices.append(slice(first, max(round(end * pixels / edge), first + 1)))
    return slices[0], slices[1]
