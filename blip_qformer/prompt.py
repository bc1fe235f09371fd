"""The prompt as tokens: what it says, where the subject's vectors go, and which token is which word.

A *block* is what a CLIP text encoder reads at once: ``<bos>``, at most 75 tokens, ``<eos>``, padding; 77 together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

from torch import Tensor

Overflow = Literal["truncate", "continue"]
OVERFLOWS: tuple[str, ...] = get_args(Overflow)

SUBJECT_WORD = "<subject>"
EMBEDDING_WORD = "<embedding>"  # a textual inversion: a tokenizer hands over its vectors without its name
SUBJECT_INDEX = 1  # among the tokens between <bos> and <eos>: behind "a", as the model was trained
WORD_END = "</w>"  # how CLIP's vocabulary marks the last piece of a word
LONG_GROUP = 8  # ComfyUI keeps shorter groups of tokens in one block


@dataclass(frozen=True, eq=False)
class Token:
    """One token between ``<bos>`` and ``<eos>``.

    Args:
        value: its id, or a vector [768] in place of one.
        weight: ComfyUI's, as in ``(word:1.2)``.
        group: tokens of one group were written with one weight; ComfyUI keeps short groups together.
        piece: its text in CLIP's vocabulary, such as ``swim`` or ``ming</w>``; for a vector, the word it is part of.
    """

    value: int | Tensor
    weight: float
    group: int
    piece: str


@dataclass(frozen=True)
class TokenSpan:
    """Where one word stands in a conditioning: positions on its token axis, counted over all blocks."""

    word: str
    positions: tuple[int, ...]


def compose_prompt(prompt: str, target: str, strength: float = 1.0, repetitions: int = 20) -> str:
    """``a {target} {prompt}``, said again and again: the authors' trick to make the prompt heard beside the subject.

    Args:
        target: the word for what is drawn; the subject's own word, or another one for style transfer.
        strength, repetitions: the sentence is repeated ``int(strength * repetitions)`` times, at least once. The text
            encoder reads 77 tokens, so more repetitions than fit change nothing.
    """
    sentence = f"a {target} {prompt.strip()}"
    return ", ".join([sentence] * max(1, int(strength * repetitions)))


def insert_subject(tokens: Sequence[Token], vectors: Iterable[Tensor], weight: float = 1.0) -> list[Token]:
    """Put a subject's vectors [16, 768] behind the first token of a prompt, all with one weight."""
    group = tokens[0].group if tokens else 0
    subject = [Token(vector, weight, group, SUBJECT_WORD) for vector in vectors]
    return [*tokens[:SUBJECT_INDEX], *subject, *tokens[SUBJECT_INDEX:]]


def fill_blocks(tokens: Iterable[Token], capacity: int, overflow: Overflow) -> list[list[Token]]:
    """Tokens -> blocks of at most ``capacity`` tokens, broken where ComfyUI breaks them.

    Args:
        overflow: ``truncate`` keeps the first block, as the references do; ``continue`` keeps all.
    """
    blocks: list[list[Token]] = [[]]
    for _, group in groupby(tokens, key=lambda token: token.group):
        group = list(group)
        is_long = len(group) >= LONG_GROUP
        while group:
            room = capacity - len(blocks[-1])
            if len(group) > room and not is_long:
                room = 0  # a short group is not torn apart
            blocks[-1].extend(group[:room])
            group = group[room:]
            if group:
                blocks.append([])
    return blocks if overflow == "continue" else blocks[:1]


def find_words(blocks: Sequence[Sequence[Token]], block_length: int) -> list[TokenSpan]:
    """The words of a prompt in order, the subject's vectors being the word ``<subject>``.

    Args:
        blocks: without ``<bos>``, ``<eos>`` and padding; ``block_length``: with them, 77.
    """
    placed = [
        (index * block_length + 1 + offset, token)
        for index, block in enumerate(blocks)
        for offset, token in enumerate(block)
    ]
    spans: list[TokenSpan] = []
    word, positions = "", []
    for (position, token), following in zip(placed, [*(token for _, token in placed[1:]), None], strict=False):
        positions.append(position)
        if isinstance(token.value, Tensor):  # the subject, or an embedding: all of its vectors are one word
            word, complete = token.piece, not _belong_together(token, following)
        else:
            word, complete = word + token.piece.removesuffix(WORD_END), token.piece.endswith(WORD_END)
        if complete:
            spans.append(TokenSpan(word, tuple(positions)))
            word, positions = "", []
    if positions:  # the last word was cut in the middle
        spans.append(TokenSpan(word, tuple(positions)))
    return spans


def _belong_together(token: Token, following: Token | None) -> bool:
    return following is not None and (token.piece, token.group) == (following.piece, following.group)
