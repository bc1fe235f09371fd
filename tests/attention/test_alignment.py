"""Alignments: swaps word by word, refinements by what both prompts have, inserted subjects exactly."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_qformer.attention.alignment import MAX_WORDS, align, split_repetitions
from blip_qformer.prompt import JOINED_WORD, SUBJECT_WORD, Token, TokenSpan, compose_prompt, fill_blocks, find_words

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


def composed(text: str, target: str = f"{SUBJECT_WORD} dog") -> list[TokenSpan]:
    """What Subject Prompt Compose makes of a text: twenty times, with the subject in the first, cut at 77 tokens."""
    first, *others = compose_prompt(text, target).replace(",", " ,").split(" , ")
    return prompt(" , ".join([first, *(other.replace(SUBJECT_WORD, "") for other in others)]))


def source_words(source: list[TokenSpan], edited: list[TokenSpan], alignment) -> list[tuple[str, str | None]]:
    """Each word of the edited prompt with the word of the source whose attention it takes, ``+`` between several."""
    found = []
    for span in edited:
        rows = alignment.mapper[:, list(span.positions)].any(dim=1)
        taken = [each.word for each in source if rows[list(each.positions)].any()]
        found.append((span.word, "+".join(taken) or None))
    return found


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


def test_as_many_words_are_no_swap_where_words_were_added_and_taken_away():
    source, edited = prompt("a cat on a red chair"), prompt("a big cat on a chair")
    assert source_words(source, edited, align(source, edited, TOKENS)) == [
        ("a", "a"),
        ("big", None),
        ("cat", "cat"),
        ("on", "on"),
        ("a", "a"),
        ("chair", "chair"),
    ]


def test_words_that_change_places_are_no_swap():
    """Each keeps its own attention; only words that the source does not have take another's."""
    source, edited = prompt("a cat and a dog by night"), prompt("a dog and a cat by day")
    assert source_words(source, edited, align(source, edited, TOKENS)) == [
        ("a", "a"),
        ("dog", None),
        ("and", "and"),
        ("a", "a"),
        ("cat", None),
        ("by", "by"),
        ("day", "night"),
    ]


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


def test_a_phrase_added_to_a_prompt_that_is_said_twenty_times():
    """Both are cut at 75 tokens, and 16 of them are the subject; a cut repetition takes what it has."""
    source, edited = composed("on a chair"), composed("in a red hat on a chair")
    assert sum(len(span.positions) for span in source) == sum(len(span.positions) for span in edited) == 75
    sentence = [
        ("a", "a"),
        ("dog", "dog"),
        *[("in", None), ("a", None), ("red", None), ("hat", None)],
        *[("on", "on"), ("a", "a"), ("chair", "chair"), (",", ",")],
    ]
    expected = [sentence[0], (SUBJECT_WORD, SUBJECT_WORD), *sentence[1:], *sentence * 4, *sentence[:9]]
    alignment = align(source, edited, TOKENS)
    assert source_words(source, edited, alignment) == expected
    assert sources(alignment)[27:37] == [23, 24, *[None] * 4, 25, 26, 27, 28]  # of the second repetition


def test_a_phrase_taken_from_a_prompt_that_is_said_twenty_times():
    """The edited prompt is shorter, so that it has repetitions that the source does not have: they are new."""
    source, edited = composed("in a red hat on a chair"), composed("on a chair")
    sentence = [(word, word) for word in ("a", "dog", "on", "a", "chair", ",")]
    new = [(word, None) for word, _ in sentence]
    found = source_words(source, edited, align(source, edited, TOKENS))
    assert found == [
        sentence[0],
        (SUBJECT_WORD, SUBJECT_WORD),
        *sentence[1:],
        *sentence * 4,
        *sentence[:5],
        new[5],
        *(new * 4)[:23],
    ]


def test_a_swap_in_a_prompt_that_is_said_twenty_times():
    source, edited = composed("on a chair"), composed("on a so/fa")
    found = source_words(source, edited, align(source, edited, TOKENS))
    assert found[:7] == [*((w, w) for w in ("a", SUBJECT_WORD, "dog", "on", "a")), ("sofa", "chair"), (",", ",")]
    assert {pair for pair in found if pair[0] != pair[1]} == {("sofa", "chair")}


def test_a_subject_that_is_inserted_where_another_thing_was_said_twenty_times():
    source, edited = composed("on a chair", "cat"), composed("on a chair")
    found = source_words(source, edited, align(source, edited, TOKENS))
    assert found[:7] == [("a", "a"), (SUBJECT_WORD, None), ("dog", None), *((w, w) for w in ("on", "a", "chair", ","))]
    assert set(found[7:]) == {("dog", None), *((w, w) for w in ("on", "a", "chair", ","))}


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("a dog , a dog", [3, 2]),
        ("a <subject> dog , a dog , a", [4, 3, 1]),
        ("a swim/ming dog , a swim", [4, 2]),  # cut in the middle of a word
        ("a dog , sunny , a dog , sunny , a dog", [5, 5, 2]),
        ("a dog a dog", [4]),
        ("a dog , a cat", [5]),
        ("a dog ,", [3]),
        ("a dog , a <subject> dog", [6]),
        ("", [0]),
    ],
)
def test_repetitions_are_found(text, lengths):
    spans = prompt(text)
    repetitions = split_repetitions(spans)
    assert [len(repetition) for repetition in repetitions] == lengths
    assert [span for repetition in repetitions for span in repetition.values()] == spans
    for repetition in repetitions:
        assert all(repetitions[0][index].word.startswith(span.word) for index, span in repetition.items())


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
    pairs = [(index, source) for index, source in enumerate(found) if source is not None]
    assert [source for _, source in pairs] == sorted({source for _, source in pairs})
    kept = [(index, source) for index, source in pairs if one[source - 1] == other[index]]
    assert len(kept) == common_length(one, other)
    swapped = [(index, source) for index, source in pairs if (index, source) not in kept]
    assert all(index == source - 1 and len(one) == len(other) for index, source in swapped)


sentences = st.lists(st.sampled_from(["a", "b/b", "c", "d", ",", SUBJECT_WORD]), max_size=8)


@settings(deadline=None)
@given(sentences, sentences, st.integers(1, 20), st.integers(1, 20))
def test_a_word_that_both_prompts_have_never_takes_the_attention_of_another(one, other, times, other_times):
    """Also where sentences are repeated and cut, and where some but not all of it is repeated."""
    source, edited = (
        prompt(" , ".join([" ".join(text)] * count)) for text, count in ((one, times), (other, other_times))
    )
    alignment = align(source, edited, TOKENS)
    assert alignment.mapper.sum(dim=1).max() <= 1 + 1e-6
    found = source_words(source, edited, alignment)
    common = {span.word for span in source} | {"b"}  # b: a word that is cut
    assert all(word == taken or taken is None or "b" in {word, taken} for word, taken in found if word in common)
    assert all(taken in {None, SUBJECT_WORD} for word, taken in found if word == SUBJECT_WORD)


def test_prompts_longer_than_can_be_aligned_are_refused():
    long = [TokenSpan("word", (position,)) for position in range(MAX_WORDS + 1)]
    with pytest.raises(ValueError, match="A prompt of 1001 words is longer than can be aligned: shorten it to 1000"):
        align(long, prompt("a dog"), 14 * TOKENS)


JOINED = TokenSpan(JOINED_WORD, tuple(range(78, 154)))


@pytest.mark.parametrize("repeats", [False, True])
def test_a_joined_block_is_taken_over_token_by_token(repeats):
    """And the prompt before it is aligned as it is without."""
    texts = ("on a chair", "in a red hat on a chair")
    source, edited = (composed(text) if repeats else prompt(text) for text in texts)
    alone = align(source, edited, 77).mapper
    mapper = align([*source, JOINED], [*edited, JOINED], 154).mapper
    assert torch.equal(mapper[:77, :77], alone)
    assert torch.equal(mapper[77:, 77:], torch.eye(77))
    assert not mapper[:77, 77:].any()
    assert not mapper[77:, :77].any()


def test_a_block_that_only_one_prompt_has_no_words_of_is_new():
    words = prompt("on a chair")
    behind = [TokenSpan(span.word, tuple(77 + position for position in span.positions)) for span in words]
    for source, edited in (([*words, JOINED], [*words, *behind]), ([*words, *behind], [*words, JOINED])):
        alignment = align(source, edited, 154)
        assert torch.equal(alignment.mapper[:77, :77], torch.eye(77))
        assert not alignment.has_source[78:].any()
        assert alignment.has_source[77]
