"""From prompts and words to the edits that the sampler carries out (arXiv 2208.01626)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompt import TokenSpan
from .alignment import align
from .edits import Edit, EditedPicture, PromptToPrompt, Reweight
from .schedule import StepRange
from .words import WordRange, WordWeight, find_in_prompts, weight_tokens


@dataclass(frozen=True)
class Settings:
    """How edits follow their source.

    Args:
        cross_steps: when they take over where each word looks.
        self_steps: when they take over which places of the picture belong together.
        weights: of the edited prompts' words.
        word_steps: ``cross_steps`` for single words of the edited prompts.
        blend_words, source_blend_words: the edited prompts' words, and the source's, to which the edits are kept.
        threshold: of local blend; 0: no blend.
        source_unguided: see :class:`~.edits.PromptToPrompt`.
    """

    cross_steps: StepRange = StepRange(0.0, 0.8)
    self_steps: StepRange = StepRange(0.0, 0.4)
    weights: Sequence[WordWeight] = ()
    word_steps: Sequence[WordRange] = ()
    blend_words: Sequence[str] = ()
    source_blend_words: Sequence[str] = ()
    threshold: float = 0.3
    source_unguided: bool = False


def follow_source(
    source: Sequence[TokenSpan],
    edited: Sequence[Sequence[TokenSpan]],
    tokens: int,
    settings: Settings,
    keep_masks: Callable[[Tensor, Tensor], None] | None = None,
    before: Sequence[Reweight] = (),
) -> tuple[Edit, ...]:
    """The edits by which pictures of some prompts follow the picture of another; none if nothing is to be done.

    Args:
        source, edited: the words of each prompt in order.
        tokens: of each conditioning.
        keep_masks: see :class:`~.edits.PromptToPrompt`.
        before: what single pictures were to have anyway.

    Raises:
        ValueError: a word stands in none of the edited prompts, or not in the source's; or a prompt is too long.
    """
    reweights = [
        Reweight(factors, StepRange(), picture)
        for picture, factors in enumerate(weight_tokens(edited, settings.weights, [tokens] * len(edited)), start=1)
        if not (factors == 1).all()
    ]
    steps = [[settings.cross_steps] * tokens for _ in edited]
    for phrase, word_steps in settings.word_steps:
        for each, positions in zip(steps, find_in_prompts(edited, phrase), strict=True):
            for position in positions:
                each[position] = word_steps
    (source_words,) = _marks([source], settings.source_blend_words, settings.threshold, tokens)
    edited_words = _marks(edited, settings.blend_words, settings.threshold, tokens)
    pictures = tuple(
        EditedPicture(align(source, spans, tokens), tuple(each), source_words, words)
        for spans, each, words in zip(edited, steps, edited_words, strict=True)
    )
    together = PromptToPrompt(pictures, settings.self_steps, settings.threshold, settings.source_unguided, keep_masks)
    edits = (*before, *reweights, together)
    return () if edits == (together,) and together.is_neutral else edits


def _marks(
    prompts: Sequence[Sequence[TokenSpan]], phrases: Sequence[str], threshold: float, tokens: int
) -> list[Tensor | None]:
    """For each prompt 1 at the tokens of some phrases [tokens]; None: none of them stands there, or blend is off."""
    marks = [torch.zeros(tokens) for _ in prompts]
    for phrase in phrases:
        for mark, positions in zip(marks, find_in_prompts(prompts, phrase), strict=True):
            mark[list(positions)] = 1.0
    return [mark if threshold > 0 and mark.any() else None for mark in marks]
