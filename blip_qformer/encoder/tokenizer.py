"""Tokenize subject words with BERT's vocabulary, which lies beside this file.

``vocabulary.txt`` is bert-base-uncased's (Apache-2.0, 30522 lines). The Q-Former has one token more, ``[DEC]``, with
which image-grounded text generation begins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tokenizers import Encoding
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
DEC_TOKEN = "[DEC]"

log = logging.getLogger("blip_diffusion")


@cache
def bert_tokenizer() -> BertWordPieceTokenizer:
    """Return the tokenizer, read from ``vocabulary.txt`` at its first use; nothing is downloaded."""
    tokenizer = BertWordPieceTokenizer(str(VOCABULARY), lowercase=True)
    tokenizer.add_special_tokens([DEC_TOKEN])
    return tokenizer


def tokenize_subjects(words: Sequence[str], max_tokens: int = 512) -> tuple[Tensor, Tensor]:
    """Tokenize a batch of subject words.

    Args:
        words: The word for the subject of each image: ``["dog", "teddy bear"]``.
        max_tokens: The most tokens that the Q-Former has positions for, ``[CLS]`` and ``[SEP]`` included.

    Returns:
        ``input_ids`` [B, T] and ``attention_mask`` [B, T], padded to the longest word.

    Raises:
        ValueError: A word is empty, too long, or made of nothing that the vocabulary has.
    """
    encodings = [_tokenize(word, max_tokens) for word in words]
    length = max(len(encoding.ids) for encoding in encodings)
    for encoding in encodings:
        encoding.pad(length)  # [PAD] is id 0
    input_ids = torch.tensor([encoding.ids for encoding in encodings])
    attention_mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    return input_ids, attention_mask


def _tokenize(word: str, max_tokens: int) -> Encoding:
    """Tokenize one word, or say in one sentence what is wrong with it."""
    if not word.strip():
        raise ValueError('The subject word is empty: name the thing in the picture, for example "dog".')
    encoding = bert_tokenizer().encode(word)
    content = encoding.tokens[1:-1]  # without [CLS] and [SEP]
    if len(encoding.ids) > max_tokens:
        raise ValueError(
            f'The subject word is {len(content)} tokens long ("{word[:40]}..."), but the Q-Former reads at most '
            f"{max_tokens - 2}: name the thing in one to three words and put the rest into the prompt."
        )
    unknown = content.count("[UNK]")
    if unknown == len(content):
        raise ValueError(
            f'The Q-Former knows no part of the subject word "{word}": name the thing in English, for example "dog".'
        )
    if unknown:
        log.warning('The Q-Former does not know every part of the subject word "%s"; an English word works best.', word)
    return encoding
