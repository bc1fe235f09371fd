"""From prompts and words to the edits that the sampler carries out (arXiv 2208.01626)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompt import TokenSpan
from .alignment import align
from .edits import Edit, EditedImage, PromptToPrompt, Reweight
from .schedule import StepRange
from .words import WordRange, WordWeight, find_in_prompts, weight_tokens, with_end


@dataclass(frozen=True)
class PromptToPromptSettings:
    """How edited images follow their source.

    Args:
        cross_steps: The steps in which the source's cross-attention is injected: what stands where.
        self_steps: The steps in which the source's self-attention is injected: outlines and layout.
        weights: Weights of words of the edited prompts.
        word_steps: ``cross_steps`` of single words of the edited prompts.
        blend_words: Words of the edited prompts; where they attend the image may change.
        source_blend_words: The same for words of the source's prompt.
        threshold: Threshold of local blend; 0 means no local blend.
        source_unguided: Whether the source is sampled without guidance, see :class:`~.edits.PromptToPrompt`.
    """

    cross_steps: StepRange = StepRange(0.0, 0.8)
    self_steps: StepRange = StepRange(0.0, 0.4)
    weights: Sequence[WordWeight] = ()
    word_steps: Sequence[WordRange] = ()
    blend_words: Sequence[str] = ()
    source_blend_words: Sequence[str] = ()
    threshold: float = 0.3
    source_unguided: bool = False


def build_edits(
    source: Sequence[TokenSpan],
    edited: Sequence[Sequence[TokenSpan]],
    tokens: int,
    settings: PromptToPromptSettings,
    keep_masks: Callable[[Tensor, Tensor], None] | None = None,
    reweights: Sequence[Reweight] = (),
) -> tuple[Edit, ...]:
    """Build the edits by which the images of some prompts follow the image of a source prompt.

    Args:
        source: The source's words in order.
        edited: The words of each edited prompt in order.
        tokens: Number of tokens of each conditioning.
        settings: How the edited images follow their source.
        keep_masks: Receives the masks of local blend, see :class:`~.edits.PromptToPrompt`.
        reweights: Edits that single prompts carry already.

    Returns:
        The edits; empty if nothing is to be done.

    Raises:
        ValueError: If a word stands in none of the edited prompts or not in the source's, or a prompt is too long.
    """
    weighted = [
        Reweight(factors, StepRange(), image)
        for image, factors in enumerate(weight_tokens(edited, settings.weights, [tokens] * len(edited)), start=1)
        if not (factors == 1).all()
    ]
    steps = [[settings.cross_steps] * tokens for _ in edited]
    edited_with_end = [with_end(spans, tokens) for spans in edited]
    for phrase, word_steps in settings.word_steps:
        for token_steps, positions in zip(steps, find_in_prompts(edited_with_end, phrase), strict=True):
            for position in positions:
                token_steps[position] = word_steps
    (source_words,) = _blend_words([source], settings.source_blend_words, settings.threshold, tokens)
    edited_words = _blend_words(edited, settings.blend_words, settings.threshold, tokens)
    images = tuple(
        EditedImage(align(source, spans, tokens), tuple(token_steps), source_words, words)
        for spans, token_steps, words in zip(edited, steps, edited_words, strict=True)
    )
    prompt_to_prompt = PromptToPrompt(
        images, settings.self_steps, settings.threshold, settings.source_unguided, keep_masks
    )
    edits = (*reweights, *weighted, prompt_to_prompt)
    return () if edits == (prompt_to_prompt,) and prompt_to_prompt.is_neutral else edits


def _blend_words(
    prompts: Sequence[Sequence[TokenSpan]], phrases: Sequence[str], threshold: float, tokens: int
) -> list[Tensor | None]:
    """For each prompt 1 at the tokens of some phrases, [tokens]; None if it has none of them, or blend is off."""
    masks = [torch.zeros(tokens) for _ in prompts]
    for phrase in phrases:
        for mask, positions in zip(masks, find_in_prompts(prompts, phrase), strict=True):
            mask[list(positions)] = 1.0
    return [mask if threshold > 0 and mask.any() else None for mask in masks]
