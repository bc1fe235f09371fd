"""Subject vectors of training pairs: an image of a subject, and the word for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...encoder import SubjectEncoder, tokenize_subjects
from ...encoder.tokenizer import bert_tokenizer


def qformer_output(encoder: SubjectEncoder, pixel_values: Tensor, words: Sequence[str]) -> Tensor:
    """Run the frozen image encoder and the Q-Former.

    Args:
        encoder: Subject encoder.
        pixel_values: Preprocessed images of shape [B, 3, S, S].
        words: Word for the subject of each image.

    Returns:
        Output of the queries of shape [B, Q, width], before the projection.

    Raises:
        ValueError: A word has more tokens than the Q-Former reads.
    """
    tokens = tokenize_subjects(words, encoder.config.qformer.text_positions)
    ids, mask = (each.to(pixel_values.device) for each in tokens)  # [B, T] each
    with torch.no_grad():
        image_tokens = encoder.vision(pixel_values)  # [B, N, image width]
    return encoder.qformer(image_tokens, ids, mask)


def replace_words(
    words: Sequence[str], captions: Sequence[str], probability: float, generators: Sequence[torch.Generator]
) -> tuple[list[str], list[str]]:
    """Replace some pairs' words by any word of the vocabulary, in the caption as well.

    Where the word tells nothing, the model has to read the subject from the image. With few subjects to learn from it
    would otherwise learn by heart what each word looks like, and know nothing of a word that is new.

    Args:
        words: Word of each pair.
        captions: Caption of each pair.
        probability: How likely a word is replaced.
        generators: Generator of each pair; nothing is sampled from them where the probability is 0.

    Returns:
        Words and captions.
    """
    if not probability:
        return list(words), list(captions)
    replaced = []
    for word, caption, generator in zip(words, captions, generators, strict=True):
        sampled, which = torch.rand(2, generator=generator).tolist()
        other = vocabulary_words()[int(which * len(vocabulary_words()))] if sampled < probability else word
        replaced.append((other, _replace_word(caption, word, other)))
    return [word for word, _ in replaced], [caption for _, caption in replaced]


def _replace_word(caption: str, word: str, other: str) -> str:
    """Replace a word wherever it stands by itself: not in the "catamaran" of a "cat"."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _: other, caption)


@cache
def vocabulary_words() -> tuple[str, ...]:
    """List the whole words among BERT's tokens, in alphabetical order."""
    tokens = bert_tokenizer().get_vocab()
    return tuple(sorted(token for token in tokens if token.isascii() and token.isalpha() and len(token) > 2))
