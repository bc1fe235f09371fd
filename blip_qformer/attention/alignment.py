"""Which token of an edited prompt stands for which token of its source (arXiv 2208.01626, sections 3.2 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompt import SUBJECT_WORD, TokenSpan

BLOCK = 77  # tokens that a CLIP text encoder reads at once: <bos>, 75 of content, <eos> and padding behind them
MOST_WORDS = 1000  # of a prompt; the table of the alignment has as many entries as the square of this


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the attention on a source's tokens is handed to the tokens of its edit.

    Args:
        mapper: [tokens, tokens]; row i, column j is how much of the attention on source token i goes to edited token j.
        has_source: [tokens], bool; which edited tokens have one. The others are new.
    """

    mapper: Tensor
    has_source: Tensor

    @property
    def is_identity(self) -> bool:
        """Whether every token is its own source."""
        return bool(self.has_source.all()) and torch.equal(self.mapper, torch.eye(len(self.mapper)))


def align(source: Sequence[TokenSpan], edited: Sequence[TokenSpan], tokens: int) -> Alignment:
    """The alignment of two prompts.

    Of as many words each, they are swapped place by place. Otherwise the words that both have, in order, are each
    other's (the longest common subsequence), and the rest of the edited prompt is new: refined, in the paper's word. A
    subject's vectors are never swapped with a plain word, so that the subject which Subject Prompt Compose inserts is
    new, and the words behind it are shifted.

    Args:
        source, edited: their words in order, as :func:`~blip_qformer.prompt.find_words` gives them.
        tokens: of each conditioning, a multiple of 77.

    Raises:
        ValueError: a prompt has too many words.
    """
    for spans in (source, edited):
        if len(spans) > MOST_WORDS:
            raise ValueError(
                f"A prompt of {len(spans)} words is longer than can be aligned: shorten it to {MOST_WORDS} words."
            )
    mapper = torch.zeros(tokens, tokens)
    pairs = _swapped(source, edited) if _can_be_swapped(source, edited) else _common(source, edited)
    for one, other in pairs:
        _hand_over(mapper, source[one].positions, edited[other].positions)
    source_frame, edited_frame = _frame(source, tokens), _frame(edited, tokens)
    for ours, theirs in zip(edited_frame, source_frame, strict=True):
        lenders = [theirs[min(index, len(theirs) - 1)] for index in range(len(ours))]
        for lender, position in zip(lenders, ours, strict=True):
            mapper[lender, position] = 1 / lenders.count(lender)  # no token lends more attention than it has
    return Alignment(mapper, mapper.any(dim=0))


def _can_be_swapped(source: Sequence[TokenSpan], edited: Sequence[TokenSpan]) -> bool:
    return [span.word == SUBJECT_WORD for span in source] == [span.word == SUBJECT_WORD for span in edited]


def _swapped(source: Sequence[TokenSpan], edited: Sequence[TokenSpan]) -> list[tuple[int, int]]:
    return [(index, index) for index in range(len(source))]


def _common(source: Sequence[TokenSpan], edited: Sequence[TokenSpan]) -> list[tuple[int, int]]:
    """Index pairs of the longest common subsequence; of several the one that begins earliest in the source.

    A prompt that is said twenty times and cut at 77 tokens offers many.
    """
    # longest[i][j]: of source[i:] and edited[j:]
    longest = [[0] * (len(edited) + 1) for _ in range(len(source) + 1)]
    for i in reversed(range(len(source))):
        for j in reversed(range(len(edited))):
            if source[i].word == edited[j].word:
                longest[i][j] = longest[i + 1][j + 1] + 1
            else:
                longest[i][j] = max(longest[i + 1][j], longest[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(source) and j < len(edited):
        if source[i].word == edited[j].word:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i][j + 1] >= longest[i + 1][j]:
            j += 1
        else:
            i += 1
    return pairs


def _hand_over(mapper: Tensor, source: Sequence[int], edited: Sequence[int]) -> None:
    """One word's tokens to another's: each to each, or where their numbers differ, all to all in equal parts."""
    if len(source) == len(edited):
        mapper[list(source), list(edited)] = 1
    else:
        mapper[torch.tensor(source)[:, None], torch.tensor(edited)] = 1 / len(edited)


def _frame(spans: Sequence[TokenSpan], tokens: int) -> list[list[int]]:
    """What stands around the words: of each block its <bos>, and what follows the words, <eos> and padding."""
    words = {position for span in spans for position in span.positions}
    frame = []
    for start in range(0, tokens, BLOCK):
        rest = [position for position in range(start + 1, min(start + BLOCK, tokens)) if position not in words]
        frame += [[start], rest]
    return frame
