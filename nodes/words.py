"""Which token of a conditioning is which word."""

from __future__ import annotations

import comfy.sd
from torch import Tensor

from ..blip_qformer.prompt import TokenSpan, fill_blocks, find_words
from .conditioning import CLIP_L, ENCODER_NAMES, TOKEN_SPANS, Conditioning, read_tokens


def words_of(conditioning: Conditioning, clip: comfy.sd.CLIP | None, text: str) -> list[list[TokenSpan]]:
    """The words of each entry of a conditioning: those that Subject Prompt Compose left there, else a text's.

    Args:
        clip, text: what a stock conditioning was encoded with.
    Raises:
        ValueError: a conditioning does not know its words and there is no CLIP, or it was not encoded from this text.
    """
    known = [options.get(TOKEN_SPANS) for _, options in conditioning]
    if None not in known:
        return known
    if clip is None or not text.strip():
        raise ValueError(
            "This conditioning does not say which token is which word: take it from Subject Prompt Compose, or connect "
            "the clip it was encoded with and write its text."
        )
    return [
        words_of_text(clip, text, tensor) if spans is None else spans
        for spans, (tensor, _) in zip(known, conditioning, strict=True)
    ]


def words_of_text(clip: comfy.sd.CLIP, text: str, encoded: Tensor) -> list[TokenSpan]:
    """The words of a text and their positions in what CLIP Text Encode made of it, [B, tokens, width].

    Raises:
        ValueError: the CLIP is not SD1.5's, or the text has another number of blocks.
    """
    empty = clip.tokenize("")
    if set(empty) != {CLIP_L}:
        found = " + ".join(sorted(ENCODER_NAMES.get(name, name) for name in empty))
        raise ValueError(
            f"This CLIP is {found}, but attention is edited in SD1.5, whose text encoder is CLIP-L: connect an SD1.5 "
            "clip."
        )
    block = len(empty[CLIP_L][0])
    tokens = read_tokens(clip, text, encoded.shape[-1])
    blocks = fill_blocks(tokens, block - 2, "continue")
    if len(blocks) * block != encoded.shape[1]:
        raise ValueError(
            f"The text makes {len(blocks) * block} tokens and the conditioning has {encoded.shape[1]}: write the text "
            "that the conditioning was encoded from."
        )
    return find_words(blocks, block)
