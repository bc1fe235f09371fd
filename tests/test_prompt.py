"""Prompts: their text, the subject in them, blocks of tokens, and the position of each word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip_qformer.prompt import SUBJECT_WORD, Token, TokenSpan, compose_prompt, fill_blocks, find_words, insert_subject

CAPACITY = 75


VECTOR = torch.zeros(768)


def tokens(*pieces: str, group: int = 1) -> list[Token]:
    return [Token(VECTOR if piece.startswith("<") else 7, 1.0, group, piece) for piece in pieces]


@pytest.mark.parametrize(
    ("strength", "repetitions", "times"), [(1.0, 20, 20), (0.05, 20, 1), (0.0, 20, 1), (0.5, 3, 1), (2.0, 3, 6)]
)
def test_prompt_is_repeated(strength, repetitions, times):
    text = compose_prompt(" swimming underwater ", "dog", strength, repetitions)
    assert text == ", ".join(["a dog swimming underwater"] * times)


def test_subject_stands_behind_the_first_word():
    vectors = torch.randn(16, 768)
    inserted = insert_subject(tokens("a</w>", "dog</w>"), vectors, 0.7)
    assert [token.piece for token in inserted] == ["a</w>", *[SUBJECT_WORD] * 16, "dog</w>"]
    assert all(torch.equal(token.value, vector) for token, vector in zip(inserted[1:17], vectors, strict=True))
    assert {token.weight for token in inserted[1:17]} == {0.7}


@given(length=st.integers(0, 400))
def test_blocks_hold_every_token_in_order(length):
    words = tokens(*["dog</w>"] * length)
    blocks = fill_blocks(words, CAPACITY, "continue")
    assert [token for block in blocks for token in block] == words
    assert len(blocks) == max(1, -(-length // CAPACITY))
    assert fill_blocks(words, CAPACITY, "truncate") == blocks[:1]


def test_short_group_is_not_torn_apart():
    long, short = tokens(*["dog</w>"] * 73), tokens(*["cat</w>"] * 5, group=2)
    first, second = fill_blocks(long + short, CAPACITY, "continue")
    assert (len(first), len(second)) == (73, 5)


def test_words_are_found_over_pieces_blocks_and_the_subject():
    pieces = ["a</w>", *[SUBJECT_WORD] * 2, "swim", "ming</w>", "dog</w>"]
    blocks = [tokens(*pieces[:4]), tokens(*pieces[4:])]
    assert find_words(blocks, block_length=6) == [
        TokenSpan("a", (1,)),
        TokenSpan(SUBJECT_WORD, (2, 3)),
        TokenSpan("swimming", (4, 7)),
        TokenSpan("dog", (8,)),
    ]


def test_a_word_that_was_cut_is_still_named():
    assert find_words([tokens("under", "wat")], 77) == [TokenSpan("underwat", (1, 2))]


def test_an_embedding_is_one_word_and_two_are_two():
    prompt = [*tokens("<embedding>", "<embedding>"), *tokens("<embedding>", group=2), *tokens("dog</w>", group=3)]
    assert find_words([prompt], 77) == [
        TokenSpan("<embedding>", (1, 2)),
        TokenSpan("<embedding>", (3,)),
        TokenSpan("dog", (4,)),
    ]


def test_a_text_without_tokens_has_no_words():
    assert find_words([[]], 77) == []
