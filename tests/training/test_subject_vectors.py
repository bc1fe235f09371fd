"""Words that say nothing, so that a look has to come from the picture."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.training.stages import subject_vectors as questions
from blip_qformer.training.stages.base import generators
from blip_qformer.training.stages.subject_vectors import exchange_words, vocabulary_words
from tests import tiny

PAIRS = 400
WORDS = ["teddy bear"] * PAIRS
CAPTIONS = ["a teddy bear in the snow"] * PAIRS


def test_without_a_chance_words_stay_and_nothing_is_drawn():
    sources = generators(range(PAIRS))
    assert exchange_words(WORDS, CAPTIONS, 0.0, sources) == (WORDS, CAPTIONS)
    assert all(
        torch.equal(source.get_state(), other.get_state())
        for source, other in zip(sources, generators(range(PAIRS)), strict=True)
    )


def test_words_are_exchanged_in_question_and_caption_alike():
    words, captions = exchange_words(WORDS, CAPTIONS, 0.25, generators(range(PAIRS)))
    assert captions == [f"a {word} in the snow" for word in words]
    exchanged = [word for word in words if word != "teddy bear"]
    assert len(exchanged) / PAIRS == pytest.approx(0.25, abs=0.06)
    assert len(set(exchanged)) > 0.95 * len(exchanged)
    assert set(exchanged) <= set(vocabulary_words())


def test_which_word_comes_is_each_pairs_own():
    whole = exchange_words(WORDS, CAPTIONS, 0.5, generators(range(PAIRS)))
    half = exchange_words(WORDS[:50], CAPTIONS[:50], 0.5, generators(range(100, 150)))
    assert half == tuple(each[100:150] for each in whole)


def test_the_vocabulary_is_whole_words():
    words = vocabulary_words()
    assert len(words) > 15_000
    assert {"dog", "lobster", "the"} <= set(words)
    assert all(word.isalpha() and len(word) > 2 for word in words)


@pytest.mark.parametrize("stage", ["appearance", "subject"])
def test_stages_ask_with_the_exchanged_words(stage, monkeypatch):
    heard = []

    def tokenize(words, max_tokens):
        heard.append(list(words))
        return original(words, max_tokens)

    original = questions.tokenize_subjects
    monkeypatch.setattr(questions, "tokenize_subjects", tokenize)
    made, batch = (
        tiny.make_stage(stage, options={**tiny.OPTIONS[stage], "word_dropout": 1.0}),
        tiny.make_batch(stage, range(4)),
    )
    made(batch)
    assert len(heard) == 1
    assert len(heard[0]) == 4
    assert set(heard[0]) <= set(vocabulary_words()) - set(batch["words"])


def test_a_word_inside_another_stays():
    captions = ["a cat on a catamaran, the bobcat and the cat's bowl"]
    (word,), (caption,) = exchange_words(["cat"], captions, 1.0, generators([0]))
    assert caption == f"a {word} on a catamaran, the bobcat and the {word}'s bowl"


def test_a_word_longer_than_the_qformer_reads_gets_one_sentence():
    encoder = tiny.make_stage("appearance").pipeline.encoder
    size = encoder.config.vision.image_size
    with pytest.raises(ValueError, match="reads at most 30: name the thing in one to three words"):
        questions.ask(encoder, torch.zeros(1, 3, size, size), ["dog " * 31])
