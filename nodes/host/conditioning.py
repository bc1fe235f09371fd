"""Prompts through the host's own CLIP: a subject's vectors among the words, and which token is which word."""

from __future__ import annotations

import logging
from typing import Any, cast

import comfy.sd
import torch
from torch import Tensor

from ...blip_qformer.prompt import EMBEDDING_WORD, Overflow, Token, TokenSpan, fill_blocks, find_words, insert_subject
from ...blip_qformer.subject import Subject
from .checks import CLIP_L, require_clip_l

#: Key of a conditioning's dictionary under which later nodes find which positions are which word.
TOKEN_SPANS = "blip_token_spans"

#: The host's: entries of [tensor [B, tokens, width], dictionary].
Conditioning = list[list[Any]]

log = logging.getLogger("blip_diffusion")


def encode_subject_prompt(
    clip: comfy.sd.CLIP, subject: Subject, text: str, overflow: Overflow, strength: float
) -> Conditioning:
    """Encode a text with a subject behind its first word.

    Args:
        clip: Text encoder that the vectors were made for.
        subject: Subject of N rows.
        text: The whole text.
        overflow: What happens to tokens that do not fit into the first block.
        strength: ComfyUI's token weight of the vectors; 1 is the reference, 0 leaves them out.

    Returns:
        A conditioning of N rows; of one row at strength 0.

    Raises:
        ValueError: The CLIP is not the one the vectors were made for.
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
    """Tokenize a text as the host does, with weights and embeddings, but without special tokens and padding.

    Args:
        clip: Text encoder whose tokenizer reads the text.
        text: Text with ComfyUI's weights and ``embedding:name`` in it.
        width: Width of the text encoder. Embeddings of another width are left out, as the host does later.
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
    """Encode tokens; the conditioning says which of its positions are which word.

    Args:
        clip: Text encoder.
        tokens: Tokens of the prompt, without special tokens.
        overflow: What happens to tokens that do not fit into the first block.
    """
    blocks, spans = host_tokens(clip, tokens, overflow)
    # The host's annotation says tuples, but these are lists.
    return cast(Conditioning, clip.encode_from_tokens_scheduled(blocks, add_dict={TOKEN_SPANS: spans}))


def host_tokens(
    clip: comfy.sd.CLIP, tokens: list[Token], overflow: Overflow
) -> tuple[dict[str, list[list[tuple[Any, float]]]], list[TokenSpan]]:
    """Lay tokens out in blocks of 77, as the host's text encoder takes them.

    Args:
        clip: Text encoder.
        tokens: Tokens of the prompt, without special tokens.
        overflow: What happens to tokens that do not fit into the first block.

    Returns:
        The blocks of each text encoder, and which positions in them are which word.
    """
    empty_block = clip.tokenize("")[CLIP_L][0]  # <bos>, <eos> and padding
    blocks = fill_blocks(tokens, len(empty_block) - 2, overflow)
    padded = []
    for block in blocks:
        content = [(token.value, token.weight) for token in block]
        padded.append([empty_block[0], *content, *empty_block[1 : len(empty_block) - len(block)]])
    return {CLIP_L: padded}, find_words(blocks, len(empty_block))


def stack_rows(conditionings: list[Conditioning]) -> Conditioning:
    """Stack conditionings of the same words along the batch axis; the sampler applies them row by row.

    Args:
        conditionings: Conditionings with the same number of entries; the options of the first are kept.
    """
    stacked = []
    for entries in zip(*conditionings, strict=True):  # one entry, or one for each range of a scheduled CLIP
        options = dict(entries[0][1])
        pooled = [entry[1].get("pooled_output") for entry in entries]
        if all(isinstance(row, Tensor) for row in pooled):
            options["pooled_output"] = torch.cat(pooled)
        stacked.append([torch.cat([entry[0] for entry in entries]), options])
    return stacked
