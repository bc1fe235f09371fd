"""What the subject encoder is asked about training pairs: a picture of a thing, and a word for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...encoder import SubjectEncoder, tokenize_subjects
from ...encoder.tokenizer import bert_tokenizer


def ask(encoder: SubjectEncoder, pixel_values: Tensor, words: Sequence[str]) -> Tensor:
    """The Q-Former's answer [B, Q, width] about pictures [B, 3, S, S], before the projection; the ViT is frozen."""
    tokens = tokenize_subjects(words, encoder.config.qformer.text_positions)
    ids, mask = (each.to(pixel_values.device) for each in tokens)
    with torch.no_grad():
        image_tokens = encoder.vision(pixel_values)
    return encoder.qformer(image_tokens, ids, mask)


def exchange_words(
    words: Sequence[str], captions: Sequence[str], chance: float, sources: Sequence[torch.Generator]
) -> tuple[list[str], list[str]]:
    """Some pairs' words give way to any word of the vocabulary, in question and caption alike.

    Where the word says nothing, what is drawn has to come from the picture; a model with few things to learn from would
    learn by heart what each word looks like, and know nothing of a word it has not met.

    Args:
        chance: that a word is exchanged.
        sources: of chance, one for each pair; at chance 0 nothing is drawn from them.
    """
    if not chance:
        return list(words), list(captions)
    asked = []
    for word, caption, source in zip(words, captions, sources, strict=True):
        drawn, which = torch.rand(2, generator=source).tolist()
        other = vocabulary_words()[int(which * len(vocabulary_words()))] if drawn < chance else word
        asked.append((other, _exchanged(caption, word, other)))
    return [word for word, _ in asked], [caption for _, caption in asked]


def _exchanged(caption: str, word: str, other: str) -> str:
    """A caption with another word, wherever it stands by itself: not in the "catamaran" of a "cat"."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _: other, caption)


@cache
def vocabulary_words() -> tuple[str, ...]:
    """The whole words among BERT's tokens, in order."""
    tokens = bert_tokenizer().get_vocab()
    return tuple(sorted(token for token in tokens if token.isascii() and token.isalpha() and len(token) > 2))
