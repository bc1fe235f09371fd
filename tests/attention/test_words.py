"""Words of a prompt, as written and as found."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.attention.schedule import StepRange
from blip_qformer.attention.words import (
    WordWeight,
    find_phrase,
    parse_word_ranges,
    parse_word_weights,
    readable,
    weight_tokens,
)
from blip_qformer.prompt import SUBJECT_WORD, TokenSpan


def spans(text: str) -> list[TokenSpan]:
    """Words of one token each behind <bos>, but the subject, which has sixteen."""
    found, position = [], 1
    for word in text.split():
        length = 16 if word == SUBJECT_WORD else 1
        found.append(TokenSpan(word, tuple(range(position, position + length))))
        position += length
    return found


PROMPT = spans("a <subject> dog in a red hat , a dog ' s red scarf , 8 k photo cafÃ©")
SWIMMING = [TokenSpan("a", (1,)), TokenSpan("swimming", (2, 3)), TokenSpan("dog", (78,))]


def test_weights_are_read():
    text = "swimming:2.0, <subject> : 0.6,\nred hat:-0.5; dog#2:1e-1,"
    assert parse_word_weights(text) == [("swimming", 2.0), ("<subject>", 0.6), ("red hat", -0.5), ("dog#2", 0.1)]
    assert parse_word_weights(" ") == []


@pytest.mark.parametrize("piece", ["dog", "dog:", ":2", "dog=2", "dog:two", "dog:nan", "dog:inf", "dog:1:"])
def test_a_weight_that_cannot_be_read_is_named(piece):
    with pytest.raises(ValueError, match=f'"{piece}" is no word with a weight: write'):
        parse_word_weights(f"cat:1.5, {piece}, hat:2")


def test_ranges_are_read():
    expected = [("dog", StepRange(0, 0.5)), ("red hat", StepRange(0.2, 0.9)), ("a", StepRange(0, 0))]
    assert parse_word_ranges("dog:0.5, red hat:0.2-0.9, a:0") == expected


@pytest.mark.parametrize("piece", ["dog", "dog:0.9-0.2", "dog:1.5", "dog:-0.5", "dog:0.1-0.2-0.3", "dog:.-."])
def test_a_range_that_cannot_be_read_is_named(piece):
    with pytest.raises(ValueError, match=f'"{piece}" is no word with a part of the steps: write'):
        parse_word_ranges(f"cat:0.5, {piece}")


@pytest.mark.parametrize(
    ("phrase", "positions"),
    [
        ("dog", (18, 25)),
        ("Dog #2", (25,)),
        ("<subject>", tuple(range(2, 18))),
        ("red hat", (21, 22)),
        ("red", (21, 28)),
        ("dog's red", (25, 26, 27, 28)),
        ("8k photo", (31, 32, 33)),
        ("café", (34,)),
        ("CAFÉ#1", (34,)),
    ],
)
def test_phrases_are_found(phrase, positions):
    assert find_phrase(PROMPT, phrase) == positions


def test_words_of_several_tokens_and_in_further_blocks_are_found():
    assert find_phrase(SWIMMING, "swimming dog") == (2, 3, 78)


@pytest.mark.parametrize("phrase", ["cat", "do", "reddish hat", "hat red", "red scarf cat", "k", "#", ""])
def test_a_phrase_that_is_not_there_lists_the_words_that_are(phrase):
    with pytest.raises(ValueError, match="There is no .*; its words are: a, <subject>, dog, in, red, hat, ', s, scar"):
        find_phrase([span for span in PROMPT if span.word != "k"], phrase)


def test_an_occurrence_that_is_not_there_is_named():
    for number in (0, 3):
        with pytest.raises(
            ValueError, match=f'"dog#{number}" asks for number {number} of "dog", but this prompt has 2'
        ):
            find_phrase(PROMPT, f"dog#{number}")


def test_factors_of_tokens_in_several_prompts():
    weights = parse_word_weights("dog:2, dog#2:-1, <subject>:0.5")
    factors = weight_tokens([PROMPT, SWIMMING], weights, [77, 154])
    expected = [torch.ones(77), torch.ones(154)]
    expected[0][18], expected[0][25], expected[0][2:18], expected[1][78] = 2, -1, 0.5, 2
    for one, other in zip(factors, expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match='There is no "cat" in this prompt; its words are: a, swimming, dog.'):
        weight_tokens([PROMPT, SWIMMING], parse_word_weights("dog:2, cat:2"), [77, 154])


def test_the_end_of_a_prompt_has_factors():
    """<eos> and padding of every block, or of one; never <bos> and words."""
    prompts = [PROMPT, SWIMMING, []]
    weights = parse_word_weights("dog:2, <end>:0.5, <end>#1:0")
    factors = weight_tokens(prompts, weights, [77, 154, 77])
    expected = [torch.ones(77), torch.ones(154), torch.ones(77)]
    expected[0][18], expected[0][25], expected[0][35:77] = 2, 2, 0
    expected[1][4:77], expected[1][79:154], expected[1][78] = 0, 0.5, 2
    expected[2][1:77] = 0
    for one, other in zip(factors, expected, strict=True):
        assert torch.equal(one, other)
    full = weight_tokens([[TokenSpan("word", (each,)) for each in range(1, 76)]], [WordWeight("<end>", 3.0)], [77])[0]
    assert full.tolist() == [*[1.0] * 76, 3.0]
    with pytest.raises(ValueError, match='"<end>#2" asks for number 2 of "<end>", but this prompt has 1'):
        weight_tokens([PROMPT], parse_word_weights("<end>#2:0"), [77])


def test_clip_spells_bytes():
    assert [readable(word) for word in ("cafÃ©", "æĹ¥", "dog", "æľ", "<subject>")] == [
        "café",
        "日",
        "dog",
        "æľ",  # cut in the middle of a character
        "<subject>",
    ]
