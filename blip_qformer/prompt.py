"""A prompt as tokens: compose its text, insert the subject's vectors, fill blocks, and find the words again.

A *block* is the input of a CLIP text encoder: ``<bos>``, at most 75 tokens, ``<eos>`` and padding, 77 together.
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
EMBEDDING_WORD = "<embedding>"  # a textual inversion, of which a tokenizer returns the vectors and not the name
JOINED_WORD = "<joined>"  # a block that another node joined to a prompt, and of which no word is known
SUBJECT_INDEX = 1  # among the tokens between <bos> and <eos>: behind "a", as in training (arXiv 2305.14720, section 3)
WORD_END = "</w>"  # how CLIP's vocabulary marks the last piece of a word
MIN_SPLIT_GROUP = 8  # ComfyUI keeps groups of fewer tokens in one block (comfy/sd1_clip.py, max_word_length)


@dataclass(frozen=True, eq=False)
class Token:
    """One token between ``<bos>`` and ``<eos>``.

    Args:
        value: The token's id, or a vector [768] in place of one.
        weight: The token's weight in ComfyUI, as in ``(word:1.2)``.
        group: The number of the token's group: a stretch of the prompt with one weight, kept in one block if short.
        piece: The token's text in CLIP's vocabulary, such as ``swim`` or ``ming</w>``; for a vector, the word that it
            belongs to.
    """

    value: int | Tensor
    weight: float
    group: int
    piece: str


@dataclass(frozen=True)
class TokenSpan:
    """The positions of one word in a conditioning.

    Args:
        word: The word.
        positions: The word's indices on the conditioning's token axis, counted over all blocks.
    """

    word: str
    positions: tuple[int, ...]


def compose_prompt(prompt: str, target: str, strength: float = 1.0, repetitions: int = 20) -> str:
    """Compose ``a {target} {prompt}``, repeated so that the prompt counts beside the subject, as in the authors' code.

    The authors' code is ``lavis/models/blip_diffusion_models/blip_diffusion.py`` (github.com/salesforce/LAVIS).

    Args:
        prompt: What is said about the subject, such as "swimming underwater".
        target: The word for what is generated: the subject's word, or another one for style transfer.
        strength: The share of the repetitions that is used.
        repetitions: The number of repetitions at strength 1. The sentence is repeated ``int(strength * repetitions)``
            times, at least once; more than fit into 77 tokens change nothing.

    Returns:
        The sentence with its repetitions, with commas between them.
    """
    sentence = f"a {target} {prompt.strip()}"
    return ", ".join([sentence] * max(1, int(strength * repetitions)))


def insert_subject(tokens: Sequence[Token], vectors: Iterable[Tensor], weight: float = 1.0) -> list[Token]:
    """Insert a subject behind the first token of a prompt.

    Args:
        tokens: The tokens of the prompt.
        vectors: The subject's vectors [16, 768].
        weight: The weight of all of them.

    Returns:
        The tokens with the subject.
    """
    group = tokens[0].group if tokens else 0
    subject = [Token(vector, weight, group, SUBJECT_WORD) for vector in vectors]
    return [*tokens[:SUBJECT_INDEX], *subject, *tokens[SUBJECT_INDEX:]]


def fill_blocks(tokens: Iterable[Token], capacity: int, overflow: Overflow) -> list[list[Token]]:
    """Break tokens into blocks as ComfyUI does (``comfy/sd1_clip.py``).

    Args:
        tokens: The tokens of the prompt.
        capacity: The most tokens of a block.
        overflow: ``truncate`` keeps the first block, as the reference implementations do; ``continue`` keeps all.

    Returns:
        The blocks, at least one, which may be empty.
    """
    blocks: list[list[Token]] = [[]]
    for _, members in groupby(tokens, key=lambda token: token.group):
        group = list(members)
        may_split = len(group) >= MIN_SPLIT_GROUP
        while group:
            room = capacity - len(blocks[-1])
            if len(group) > room and not may_split:
                room = 0
            blocks[-1].extend(group[:room])
            group = group[room:]
            if group:
                blocks.append([])
    return blocks if overflow == "continue" else blocks[:1]


def find_words(blocks: Sequence[Sequence[Token]], block_length: int) -> list[TokenSpan]:
    """Find the words of a prompt, in order; the subject's vectors are the word ``<subject>``.

    Args:
        blocks: The tokens of each block, without ``<bos>``, ``<eos>`` and padding.
        block_length: The length of a block with them, 77.

    Returns:
        The words and their positions in the conditioning.
    """
    positioned = [
        (index * block_length + 1 + offset, token)
        for index, block in enumerate(blocks)
        for offset, token in enumerate(block)
    ]
    spans: list[TokenSpan] = []
    word: str = ""
    positions: list[int] = []
    for (position, token), following in zip(positioned, [*(token for _, token in positioned[1:]), None], strict=False):
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
    """Return whether two vectors are of one subject or embedding."""
    return following is not None and (token.piece, token.group) == (following.piece, following.group)
