"""Alignments: swaps word by word, refinements by what both prompts have, inserted subjects exactly."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_qformer.attention.alignment import MAX_WORDS, align
from blip_qformer.prompt import SUBJECT_WORD, Token, TokenSpan, fill_blocks, find_words

TOKENS = 77


def prompt(text: str, overflow: str = "truncate") -> list[TokenSpan]:
    """A text as words; ``/`` separates pieces of a word."""
    tokens = []
    for word in text.split():
        if word == SUBJECT_WORD:
            tokens += [Token(torch.zeros(4), 1.0, 1, SUBJECT_WORD)] * 16
        else:
            *pieces, last = word.split("/")
            tokens += [Token(7, 1.0, 1, piece) for piece in [*pieces, f"{last}</w>"]]
    return find_words(fill_blocks(tokens, TOKENS - 2, overflow), TOKENS) if tokens else []


def sources(alignment) -> list[int | None]:
    """For each edited token the one source token it has."""
    assert (alignment.mapper > 0).sum(dim=0).max() <= 1
    assert alignment.mapper.sum(dim=1).max() <= 1 + 1e-6  # no source token lends more attention than it has
    return [
        int(column.argmax()) if has_source else None
        for column, has_source in zip(alignment.mapper.T, alignment.has_source, strict=True)
    ]


@pytest.mark.parametrize("text", ["", "a dog in the snow", "a <subject> dog", "swim/ming " * 60])
def test_a_prompt_and_itself(text):
    alignment = align(prompt(text), prompt(text), TOKENS)
    assert alignment.is_identity


def test_a_swapped_word_takes_its_place():
    assert align(prompt("a dog in the snow"), prompt("a cat in the sand"), TOKENS).is_identity
    assert align(prompt("a <subject> dog"), prompt("a <subject> cat"), TOKENS).is_identity


def test_a_swapped_word_of_other_length():
    """Published code: the source's column is dealt out in equal shares; the words behind are shifted."""
    alignment = align(prompt("a cat runs"), prompt("a lab/ra/dor runs"), TOKENS)
    expected = torch.zeros(TOKENS, TOKENS)
    expected[0, 0] = expected[1, 1] = expected[3, 5] = 1
    expected[2, 2:5] = 1 / 3
    for position in range(6, TOKENS):  # <eos> and padding
        expected[position - 2, position] = 1
    assert torch.equal(alignment.mapper, expected)
    assert alignment.has_source.all()
    assert not alignment.is_identity
    back = align(prompt("a lab/ra/dor runs"), prompt("a cat runs"), TOKENS)
    assert back.mapper[2:5, 2].tolist() == [1, 1, 1]


def test_padding_that_the_source_does_not_have_shares_its_last_token():
    """A source that fills its block has one <eos>, and an edit with a word has one and 74 of padding."""
    alignment = align(prompt("a dog runs " * 30), prompt("cat"), TOKENS)
    assert torch.allclose(alignment.mapper[TOKENS - 1, 2:], torch.full((TOKENS - 2,), 1 / (TOKENS - 2)))


def test_an_inserted_subject():
    """The published code's mapper: m = 0, 1, none x 16, then the tokens after them in order."""
    alignment = align(prompt("a dog in the snow"), prompt("a <subject> dog in the snow"), TOKENS)
    assert sources(alignment) == [0, 1, *[None] * 16, *range(2, TOKENS - 16)]


def test_an_inserted_subject_in_a_prompt_that_is_said_twenty_times():
    text = " , ".join(["a dog in the snow"] * 20)
    alignment = align(prompt(text), prompt(text.replace("a dog", "a <subject> dog", 1)), TOKENS)
    # Cut at 75 tokens, so <eos> stands at the end of both.
    assert sources(alignment) == [0, 1, *[None] * 16, *range(2, TOKENS - 17), TOKENS - 1]


def test_a_subject_in_place_of_another_thing_is_new():
    alignment = align(prompt("a teddy bear on a chair"), prompt("a <subject> dog on a chair"), TOKENS)
    assert sources(alignment)[:23] == [0, 1, *[None] * 17, 4, 5, 6, 7]


def test_words_that_were_added_and_taken_away():
    alignment = align(prompt("a big dog in deep snow"), prompt("a dog in very deep white snow"), TOKENS)
    assert sources(alignment)[:9] == [0, 1, 3, 4, None, 5, None, 6, 7]


def test_two_blocks():
    text = "word " * 80
    alignment = align(prompt(text, "continue"), prompt("new " + text, "continue"), 2 * TOKENS)
    found = sources(alignment)
    assert found[:3] == [0, None, 1]
    assert found[75:79] == [74, 76, 77, 75]  # the last word of the first block went over into the second
    assert found[78 + 5 :] == list(range(78 + 4, 2 * TOKENS - 1))  # its last word, <eos> and padding


def common_length(one: list[str], other: list[str]) -> int:
    """Of the longest common subsequence, by trying all."""
    for length in range(min(len(one), len(other)), 0, -1):
        if {*combinations(one, length)} & {*combinations(other, length)}:
            return length
    return 0


words = st.lists(st.sampled_from("abc"), max_size=7)


@settings(deadline=None)
@given(words, words)
def test_as_many_words_as_possible_have_a_source(one, other):
    alignment = align(prompt(" ".join(one)), prompt(" ".join(other)), TOKENS)
    found = sources(alignment)[1 : 1 + len(other)]
    if len(one) == len(other):
        assert found == list(range(1, 1 + len(one)))
        return
    pairs = [(index, source) for index, source in enumerate(found) if source is not None]
    assert [source for _, source in pairs] == sorted({source for _, source in pairs})
    assert all(one[source - 1] == other[index] for index, source in pairs)
    assert len(pairs) == common_length(one, other)


def test_prompts_longer_than_can_be_aligned_are_refused():
    long = [TokenSpan("word", (position,)) for position in range(MAX_WORDS + 1)]
    with pytest.raises(ValueError, match="A prompt of 1001 words is longer than can be aligned: shorten it to 1000"):
        align(long, prompt("a dog"), 14 * TOKENS)
