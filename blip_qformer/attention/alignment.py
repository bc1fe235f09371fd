"""Which token of an edited prompt stands for which token of its source (arXiv 2208.01626, sections 3.2 and 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..prompt import JOINED_WORD, SUBJECT_WORD, TokenSpan

BLOCK = 77  # tokens that a CLIP text encoder reads at once: <bos>, 75 of content, <eos> and padding behind them
MAX_WORDS = 1000  # of a prompt; aligning two prompts needs a table of as many entries as the square of this


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the attention on a source's tokens is distributed over the tokens of its edited prompt.

    Args:
        mapper: How much of the attention on source token i goes to edited token j, of shape [tokens, tokens].
        has_source: Which edited tokens have a source token, boolean of shape [tokens]. The others are new.
    """

    mapper: Tensor
    has_source: Tensor

    @property
    def is_identity(self) -> bool:
        """Whether every token is its own source."""
        return bool(self.has_source.all()) and torch.equal(self.mapper, torch.eye(len(self.mapper)))


class Frame(NamedTuple):
    """The tokens of a block that belong to no word.

    Args:
        bos: Position of the ``<bos>`` token.
        end: Positions behind the words: the ``<eos>`` token and padding.
    """

    bos: int
    end: list[int]


def align(source: Sequence[TokenSpan], edited: Sequence[TokenSpan], tokens: int) -> Alignment:
    """Align two prompts.

    The words that both have in the same order (their longest common subsequence) correspond to each other, and the rest
    of the edited prompt is new; the paper calls this refinement. If both have as many words, and as many of them match
    one by one, the words that the source does not have are swapped with their counterparts. So a word that both
    prompts have never gets the attention of another word. A subject's vectors are never swapped with a plain word, so
    that a subject inserted by Subject Prompt Compose is new, and the words behind it are shifted.

    Prompts that repeat a sentence, as Subject Prompt Compose does, are aligned sentence by sentence, all of them as the
    first. Cut at 77 tokens, such prompts often have as many words by chance.

    Args:
        source: The source's words in order, as :func:`~blip_qformer.prompt.find_words` gives them.
        edited: The edited prompt's words in order.
        tokens: Number of tokens of each conditioning, a multiple of 77.

    Returns:
        The alignment, from the source's tokens to the edited prompt's.

    Raises:
        ValueError: If a prompt has too many words.
    """
    for spans in (source, edited):
        if len(spans) > MAX_WORDS:
            raise ValueError(
                f"A prompt of {len(spans)} words is longer than can be aligned: shorten it to {MAX_WORDS} words."
            )
    mapper = torch.zeros(tokens, tokens)
    for source_span, edited_span in _corresponding_words(source, edited):
        _map_word(mapper, source_span.positions, edited_span.positions)
    for source_frame, edited_frame in zip(find_frames(source, tokens), find_frames(edited, tokens), strict=True):
        mapper[source_frame.bos, edited_frame.bos] = 1
        _map_end(mapper, source_frame.end, edited_frame.end)
    return Alignment(mapper, mapper.any(dim=0))


def _corresponding_words(
    source: Sequence[TokenSpan], edited: Sequence[TokenSpan]
) -> Iterator[tuple[TokenSpan, TokenSpan]]:
    """Pairs of a source word and an edited word that correspond to each other; joined blocks do one by one."""
    yield from zip(
        (span for span in source if span.word == JOINED_WORD),
        (span for span in edited if span.word == JOINED_WORD),
        strict=False,
    )
    source, edited = ([span for span in spans if span.word != JOINED_WORD] for spans in (source, edited))
    source_sentences, edited_sentences = split_repetitions(source), split_repetitions(edited)
    if len(source_sentences) == 1 or len(edited_sentences) == 1:
        source_sentences, edited_sentences = [dict(enumerate(source))], [dict(enumerate(edited))]
    pairs = _pair_words(
        [span.word for span in source_sentences[0].values()], [span.word for span in edited_sentences[0].values()]
    )
    for source_sentence, edited_sentence in zip(source_sentences, edited_sentences, strict=False):
        for i, j in pairs:
            if i in source_sentence and j in edited_sentence:
                yield source_sentence[i], edited_sentence[j]


def split_repetitions(spans: Sequence[TokenSpan]) -> list[dict[int, TokenSpan]]:
    """Split a prompt that repeats a sentence and a comma, as :func:`~blip_qformer.prompt.compose_prompt` writes it.

    Args:
        spans: The words of the prompt in order. A subject may be in the first sentence alone, and the last sentence may
            be cut, also in the middle of a word.

    Returns:
        For each repetition its words, by their index in the first one, which has all of them. A prompt that repeats
        nothing is a single repetition.
    """
    plain = [index for index, span in enumerate(spans) if span.word != SUBJECT_WORD]
    words = [spans[index].word for index in plain]
    for period in range(1, len(words)):
        length = plain[period]  # of the first sentence, with its subject
        has_later_subject = len(spans) - length > len(words) - period
        if words[period - 1].endswith(",") and _repeats(words, period) and not has_later_subject:
            sentences = [dict(enumerate(spans[:length]))]
            for start in range(length, len(spans), period):
                sentences.append(dict(zip(plain[:period], spans[start : start + period], strict=False)))
            return sentences
    return [dict(enumerate(spans))]


def _repeats(words: Sequence[str], period: int) -> bool:
    """Whether each word is that of one period before; the last one may be cut."""
    return words[period:-1] == words[: -1 - period] and words[-1 - period].startswith(words[-1])


def _pair_words(source: Sequence[str], edited: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of the words that correspond to each other."""
    common = _longest_common_subsequence(source, edited)
    has_same_subjects = [word == SUBJECT_WORD for word in source] == [word == SUBJECT_WORD for word in edited]
    if not has_same_subjects or sum(map(str.__eq__, source, edited)) < len(common):
        return common
    return [
        (index, index)
        for index, (word, counterpart) in enumerate(zip(edited, source, strict=True))
        if word == counterpart or word not in source
    ]


def _longest_common_subsequence(source: Sequence[str], edited: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of the longest common subsequence; of several, the one that begins earliest in the source."""
    # lengths[i][j]: of the longest common subsequence of source[i:] and edited[j:]
    lengths = [[0] * (len(edited) + 1) for _ in range(len(source) + 1)]
    for i in reversed(range(len(source))):
        for j in reversed(range(len(edited))):
            if source[i] == edited[j]:
                lengths[i][j] = lengths[i + 1][j + 1] + 1
            else:
                lengths[i][j] = max(lengths[i + 1][j], lengths[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(source) and j < len(edited):
        if source[i] == edited[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif lengths[i][j + 1] >= lengths[i + 1][j]:
            j += 1
        else:
            i += 1
    return pairs


def _map_word(mapper: Tensor, source: Sequence[int], edited: Sequence[int]) -> None:
    """Map one word's tokens to another's: one to one, or where their numbers differ, all to all in equal shares."""
    if len(source) == len(edited):
        mapper[list(source), list(edited)] = 1
    else:
        mapper[torch.tensor(source)[:, None], torch.tensor(edited)] = 1 / len(edited)


def _map_end(mapper: Tensor, source: Sequence[int], edited: Sequence[int]) -> None:
    """Map tokens one to one; if the edited prompt has more, the source's last token is shared among the rest."""
    if not source:  # a joined block has no end of its own
        return
    sources = [source[min(index, len(source) - 1)] for index in range(len(edited))]
    for source_position, edited_position in zip(sources, edited, strict=True):
        mapper[source_position, edited_position] = 1 / sources.count(source_position)


def find_frames(spans: Sequence[TokenSpan], tokens: int) -> list[Frame]:
    """Find the tokens around the words of a prompt.

    Args:
        spans: The words of the prompt in order.
        tokens: Number of tokens of the prompt, a multiple of 77.

    Returns:
        The frame of each block.
    """
    words = {position for span in spans for position in span.positions}
    return [
        Frame(start, [position for position in range(start + 1, min(start + BLOCK, tokens)) if position not in words])
        for start in range(0, tokens, BLOCK)
    ]
