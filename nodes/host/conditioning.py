"""A subject in a prompt, through the host's own CLIP: what flows out of Subject Prompt Compose."""

from __future__ import annotations

import logging

import comfy.sd
import torch
from torch import Tensor

from ...blip_qformer.prompt import EMBEDDING_WORD, Overflow, Token, TokenSpan, fill_blocks, find_words, insert_subject
from ...blip_qformer.subject import Subject
from .checks import CLIP_L, require_clip_l, require_clip_l_for_edits

#: Key of the conditioning's dictionary under which later nodes find which positions are which word.
TOKEN_SPANS = "blip_token_spans"


log = logging.getLogger("blip_diffusion")


Conditioning = list[list]  # of [tensor [B, tokens, 768], dictionary]


def encode_subject_prompt(
    clip: comfy.sd.CLIP, subject: Subject, text: str, overflow: Overflow, strength: float
) -> Conditioning:
    """Encode a text with a subject behind its first word; N subjects make a conditioning of N rows.

    Args:
        strength: ComfyUI's token weight on the sixteen vectors. 1 is the reference, 0 leaves them out.

    Raises:
        ValueError: the CLIP is not the one the vectors were made for.
    """
    width = subject.vectors.shape[-1]
    require_clip_l(clip, width)
    tokens = read_tokens(clip, text, width)
    if strength == 0:
        return encode_tokens(clip, tokens, overflow)
    return stack_rows(
        [encode_tokens(clip, insert_subject(tokens, vectors, strength), overflow) for vectors in subject.vectors]
    )


def read_tokens(clip: comfy.sd.CLIP, text: str, width: int) -> list[Token]:
    """A text through the host's tokenizer, weights and embeddings included, without special tokens and padding.

    An embedding of another width than the text encoder's is left out here, as the host would leave it out later.
    """
    tokens = []
    for block in clip.tokenize(text, return_word_ids=True)[CLIP_L]:
        for value, weight, group in block:
            if group == 0:  # the host's mark for <bos>, <eos> and padding
                continue
            if not isinstance(value, Tensor):
                tokens.append(Token(value, weight, group, clip.tokenizer.untokenize([(value, weight)])[0][1]))
            elif value.shape[-1] == width:
                tokens.append(Token(value, weight, group, EMBEDDING_WORD))
            else:
                log.warning("An embedding of width %d was left out: this CLIP reads %d.", value.shape[-1], width)
    return tokens


def encode_tokens(clip: comfy.sd.CLIP, tokens: list[Token], overflow: Overflow) -> Conditioning:
    """Tokens through the host's text encoder; the conditioning says which of its positions are which word."""
    filled, words = host_tokens(clip, tokens, overflow)
    return clip.encode_from_tokens_scheduled(filled, add_dict={TOKEN_SPANS: words})


def host_tokens(clip: comfy.sd.CLIP, tokens: list[Token], overflow: Overflow) -> tuple[dict, list[TokenSpan]]:
    """Tokens as the host's text encoder takes them, and which of its positions are which word."""
    empty_block = clip.tokenize("")[CLIP_L][0]  # <bos>, <eos> and padding
    blocks = fill_blocks(tokens, len(empty_block) - 2, overflow)
    filled = []
    for block in blocks:
        content = [(token.value, token.weight) for token in block]
        filled.append([empty_block[0], *content, *empty_block[1 : len(empty_block) - len(block)]])
    return {CLIP_L: filled}, find_words(blocks, len(empty_block))


def stack_rows(rows: list[Conditioning]) -> Conditioning:
    """Conditionings of the same words -> one with a row for each, which the sampler applies row by row."""
    stacked = []
    for entries in zip(*rows, strict=True):  # one entry, or one for each part of a scheduled CLIP
        options = dict(entries[0][1])
        pooled = [entry[1].get("pooled_output") for entry in entries]
        if all(isinstance(row, Tensor) for row in pooled):
            options["pooled_output"] = torch.cat(pooled)
        stacked.append([torch.cat([entry[0] for entry in entries]), options])
    return stacked


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
    require_clip_l_for_edits(clip)
    block = len(clip.tokenize("")[CLIP_L][0])
    tokens = read_tokens(clip, text, encoded.shape[-1])
    blocks = fill_blocks(tokens, block - 2, "continue")
    if len(blocks) * block != encoded.shape[1]:
        raise ValueError(
            f"The text makes {len(blocks) * block} tokens and the conditioning has {encoded.shape[1]}: write the text "
            "that the conditioning was encoded from."
        )
    return find_words(blocks, block)
