"""From prompts and words to the edits that the sampler carries out (arXiv 2208.01626)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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
        blend_regions: Whether the image may change only in the regions of the prompts.
    """

    cross_steps: StepRange = StepRange(0.0, 0.8)
    self_steps: StepRange = StepRange(0.0, 0.4)
    weights: Sequence[WordWeight] = ()
    word_steps: Sequence[WordRange] = ()
    blend_words: Sequence[str] = ()
    source_blend_words: Sequence[str] = ()
    threshold: float = 0.3
    source_unguided: bool = False
    blend_regions: bool = False

    @property
    def has_local_blend(self) -> bool:
        """Whether there are blend words, and the threshold does not switch them off."""
        return self.threshold > 0 and bool(self.blend_words or self.source_blend_words)


class PromptGroup(NamedTuple):
    """The prompts of a source and of its edited images: of the scene, or of one region.

    Args:
        words: The words of the source and of each edited prompt, in order.
        tokens: Number of tokens of each prompt.
        reweights: Edits that single prompts carry already.
    """

    words: Sequence[Sequence[TokenSpan]]
    tokens: int
    reweights: Sequence[Reweight]


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
    edits = _edits(PromptGroup([source, *edited], tokens, reweights), settings, keep_masks)
    (edit,) = [edit for edit in edits if isinstance(edit, PromptToPrompt)]
    return () if edits == (edit,) and edit.is_neutral else edits


def build_regional_edits(
    groups: Sequence[PromptGroup],
    settings: PromptToPromptSettings,
    keep_masks: Callable[[Tensor, Tensor], None] | None = None,
) -> list[tuple[Edit, ...]]:
    """Build the edits of images whose scene and regions have prompts of their own.

    Args:
        groups: The prompts of the scene, and of each region.
        settings: How the edited images follow their source. A word may stand in any of the prompts.
        keep_masks: Receives the masks of local blend, see :class:`~.edits.PromptToPrompt`.

    Returns:
        The edits of each of the groups, none of them empty.

    Raises:
        ValueError: If a word stands in none of the edited prompts, or a prompt is too long.
    """
    all_edited = [with_end(words, group.tokens) for group in groups for words in group.words[1:]]
    for phrase, _ in (*settings.weights, *settings.word_steps):
        find_in_prompts(all_edited, phrase)
    edits = []
    for group in groups:
        edited = [with_end(words, group.tokens) for words in group.words[1:]]
        weights = [each for each in settings.weights if _has_phrase(edited, each.phrase)]
        word_steps = [each for each in settings.word_steps if _has_phrase(edited, each.phrase)]
        edits.append(_edits(group, replace(settings, weights=weights, word_steps=word_steps), keep_masks))
    return edits


def _edits(
    group: PromptGroup, settings: PromptToPromptSettings, keep_masks: Callable[[Tensor, Tensor], None] | None
) -> tuple[Edit, ...]:
    """The edits of one group, the last of which is the :class:`~.edits.PromptToPrompt`."""
    (source, *edited), tokens = group.words, group.tokens
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
        images, settings.self_steps, settings.threshold, settings.source_unguided, keep_masks, settings.blend_regions
    )
    return (*group.reweights, *weighted, prompt_to_prompt)


def _has_phrase(prompts: Sequence[Sequence[TokenSpan]], phrase: str) -> bool:
    """Whether one of some prompts has a phrase."""
    try:
        find_in_prompts(prompts, phrase)
    except ValueError:
        return False
    return True


def _blend_words(
    prompts: Sequence[Sequence[TokenSpan]], phrases: Sequence[str], threshold: float, tokens: int
) -> list[Tensor | None]:
    """For each prompt 1 at the tokens of some phrases, [tokens]; None if it has none of them, or blend is off."""
    masks = [torch.zeros(tokens) for _ in prompts]
    for phrase in phrases:
        for mask, positions in zip(masks, find_in_prompts(prompts, phrase), strict=True):
            mask[list(positions)] = 1.0
    return [mask if threshold > 0 and mask.any() else None for mask in masks]
