"""Edited attention as the papers write it: a stock MODEL whose attention function builds A, edits it and multiplies V.

Nothing of the pack is used. Rows of a call are told by their prompt, steps by counting sigmas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.attention.explicit import attended, probabilities

#: (A [heads, N, T] of each row of one conditioning, step, steps, map edges, latent edges) -> the same, edited in place
EditMaps = Callable[[Tensor, int, int, tuple[int, int], tuple[int, int]], None]


class ExplicitAttention:
    """Attention with its probabilities.

    Args:
        prompts: Tensors of shape [1, tokens, width], one for each image of a group; their rows stand in a call one
            behind the other, as often as there are groups.
        cross: What is done with the cross-attention of a group, of shape [images, heads, N, T].
        self_: The same for its self-attention.
    """

    def __init__(self, prompts: list[Tensor], cross: EditMaps | None = None, self_: EditMaps | None = None) -> None:
        self.prompts, self.cross, self.self_ = prompts, cross, self_
        self.groups: list[list[int]] = []

    def on(self, model):
        """A copy of a MODEL that attends like this."""
        model = model.clone()
        model.add_wrapper_with_key("diffusion_model", "explicit", self.find_rows)
        model.model_options["transformer_options"]["optimized_attention_override"] = self.attend
        return model

    def find_rows(self, executor, x, timesteps, context, *args, **kwargs):
        """Which rows of this call have which prompt."""
        starts = []
        for row in range(len(context)):
            group = context[row : row + len(self.prompts)]
            if len(group) == len(self.prompts) and all(
                torch.equal(each[: prompt.shape[1]], prompt[0])
                for each, prompt in zip(group, self.prompts, strict=True)
            ):
                starts.append(row)
        self.groups = [list(range(start, start + len(self.prompts))) for start in starts]
        return executor(x, timesteps, context, *args, **kwargs)

    def attend(self, function, query, key, values, heads, *args, transformer_options, **kwargs):
        """In place of the host's attention function."""
        a = probabilities(query, key, heads)
        sigmas = transformer_options["sample_sigmas"]
        steps = len(sigmas) - 1
        step = int((sigmas[:-1] >= transformer_options["sigmas"][0] * (1 - 1e-3)).sum()) - 1
        edit = self.self_ if key.shape[1] == query.shape[1] else self.cross
        self.block = transformer_options["block"][0]
        edges = tuple(transformer_options["activations_shape"][-2:]), tuple(transformer_options["original_shape"][-2:])
        for rows in self.groups if edit else ():
            maps = a[rows]
            edit(maps, step, steps, *edges)
            a[rows] = maps
        return attended(a, values, heads)


def begins_with(context: Tensor, prompt: Tensor) -> bool:
    """Whether a row [T, width] of a call has a prompt [1, tokens, width]."""
    return torch.equal(context[: prompt.shape[1]], prompt[0])


def copies(maps: Tensor, tokens: int = 77) -> list[Tensor]:
    """A [..., T] -> a view for each copy of the prompt, without what stands behind them."""
    return [copy for copy in maps.split(tokens, dim=-1) if copy.shape[-1] == tokens]


def is_coarse(edges: tuple[int, int], latent: tuple[int, int]) -> bool:
    """At most 16 x 16 for a latent of 64 x 64."""
    return edges[0] * 4 < latent[0] + 4 and edges[1] * 4 < latent[1] + 4


def follow(mapper: Tensor, alpha: Callable[[int, int], Tensor], factors: Tensor | None = None, seen=None) -> EditMaps:
    """The published cross-attention controller for [source, edit]: replace or refine, then re-weight.

    Args:
        alpha: (step, steps) -> [77], 1 where the source's attention is taken over.
        seen: called with the maps before they are re-weighted.
    """

    def edit(maps, step, steps, *edges):
        share = alpha(step, steps)
        for source, edited in zip(copies(maps[0]), copies(maps[1]), strict=True):
            edited.copy_(source @ mapper * share + edited * (1 - share))
        if share.any():  # what other packs append to the prompt gets the source's attention
            behind = maps.shape[-1] // 77 * 77
            maps[1, ..., behind:] = maps[0, ..., behind:]
        if seen is not None:
            seen(maps, *edges)
        for edited in copies(maps[1]) if factors is not None else ():
            edited.mul_(factors)

    return edit


def inject(until: float) -> EditMaps:
    """The published self-attention controller for [source, edit, ...]."""

    def edit(maps, step, steps, *edges):
        if step < int(until * steps + 1e-4) and is_coarse(*edges):
            maps[1:] = maps[:1].clone()

    return edit


class ExplicitBlend:
    """The published local blend for [source, edit], with a sampler of its own: Euler's step, then the blend.

    Args:
        words: positions of the source's words and of the edit's; none: without.
    """

    def __init__(self, words: tuple[list[int], list[int]], threshold: float) -> None:
        self.words, self.threshold = words, threshold
        self.sums: list[Tensor | int] = [0, 0]
        self.attention: ExplicitAttention | None = None

    def see(self, maps: Tensor, edges: tuple[int, int], latent: tuple[int, int]) -> None:
        """Add up the words' columns where a map has a quarter of the latent's edges."""
        if self.attention.block != "middle" and edges == tuple(-(-edge // 4) for edge in latent):
            for row, positions in enumerate(self.words):
                for copy in copies(maps[row]):
                    self.sums[row] += copy[..., positions].sum(-1).mean(0).reshape(edges)

    def mask(self, size: tuple[int, int]) -> Tensor:
        """[H, W], 0 or 1."""
        masks = []
        for total, positions in zip(self.sums, self.words, strict=True):
            if positions:
                spread = torch.nn.functional.max_pool2d(total[None, None], (3, 3), (1, 1), padding=(1, 1))
                resized = torch.nn.functional.interpolate(spread, size=size)[0, 0]
                masks.append(resized / resized.max() > self.threshold)
        return torch.stack(masks).any(0).float()

    def sample(self, model, x, sigmas, extra_args, callback=None, disable=None):
        """A sampler function of the host."""
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            denoised = model(x, sigma.expand(len(x)), **extra_args)
            x = x + (x - denoised) / sigma * (following - sigma)
            x[1] = x[0] + self.mask(x.shape[-2:]) * (x[1] - x[0])
        return x
