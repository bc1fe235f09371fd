"""Words that tell nothing, so that the appearance has to come from the image."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.training.stages import subject_vectors
from blip_qformer.training.stages.base import make_generators
from blip_qformer.training.stages.subject_vectors import replace_words, vocabulary_words
from tests import tiny

PAIRS = 400
WORDS = ["teddy bear"] * PAIRS
CAPTIONS = ["a teddy bear in the snow"] * PAIRS


def test_at_probability_0_words_stay_and_nothing_is_sampled():
    generators = make_generators(range(PAIRS))
    assert replace_words(WORDS, CAPTIONS, 0.0, generators) == (WORDS, CAPTIONS)
    assert all(
        torch.equal(generator.get_state(), other.get_state())
        for generator, other in zip(generators, make_generators(range(PAIRS)), strict=True)
    )


def test_words_are_replaced_in_question_and_caption_alike():
    words, captions = replace_words(WORDS, CAPTIONS, 0.25, make_generators(range(PAIRS)))
    assert captions == [f"a {word} in the snow" for word in words]
    replaced = [word for word in words if word != "teddy bear"]
    assert len(replaced) / PAIRS == pytest.approx(0.25, abs=0.06)
    assert len(set(replaced)) > 0.95 * len(replaced)
    assert set(replaced) <= set(vocabulary_words())


def test_which_word_comes_is_each_pairs_own():
    whole = replace_words(WORDS, CAPTIONS, 0.5, make_generators(range(PAIRS)))
    half = replace_words(WORDS[:50], CAPTIONS[:50], 0.5, make_generators(range(100, 150)))
    assert half == tuple(each[100:150] for each in whole)


def test_the_vocabulary_is_whole_words():
    words = vocabulary_words()
    assert len(words) > 15_000
    assert {"dog", "lobster", "the"} <= set(words)
    assert all(word.isalpha() and len(word) > 2 for word in words)


@pytest.mark.parametrize(
    ("stage", "options"), [("appearance", {"word_dropout": 1.0}), ("subject", {"dropout": {"word": 1.0}})]
)
def test_stages_encode_with_the_replaced_words(stage, options, monkeypatch):
    heard = []

    def tokenize(words, max_tokens):
        heard.append(list(words))
        return original(words, max_tokens)

    original = subject_vectors.tokenize_subjects
    monkeypatch.setattr(subject_vectors, "tokenize_subjects", tokenize)
    made, batch = (
        tiny.make_stage(stage, options={**tiny.OPTIONS[stage], **options}),
        tiny.make_batch(stage, range(4)),
    )
    made(batch)
    assert len(heard) == 1
    assert len(heard[0]) == 4
    assert set(heard[0]) <= set(vocabulary_words()) - set(batch["words"])


def test_a_word_inside_another_stays():
    captions = ["a cat on a catamaran, the bobcat and the cat's bowl"]
    (word,), (caption,) = replace_words(["cat"], captions, 1.0, make_generators([0]))
    assert caption == f"a {word} on a catamaran, the bobcat and the {word}'s bowl"


def test_a_word_longer_than_the_qformer_reads_gets_one_sentence():
    encoder = tiny.make_stage("appearance").pipeline.encoder
    size = encoder.config.vision.image_size
    with pytest.raises(ValueError, match="reads at most 30: name the thing in one to three words"):
        subject_vectors.qformer_output(encoder, torch.zeros(1, 3, size, size), ["dog " * 31])
