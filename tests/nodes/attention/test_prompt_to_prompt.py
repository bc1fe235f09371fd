"""Prompt-to-Prompt Edit in the host's own samplers, against explicit probabilities."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.explicit import ExplicitAttention, follow, inject
from tests.nodes.attention.graphs import (
    KNOWN,
    LONG,
    SOURCE,
    SUBJECT_MAPPER,
    SWAPPED,
    beside_other_patches,
    close,
    counted,
    differ,
    empty,
    factors_at,
    inserted,
    pair,
    plain,
    sample,
    sample_without_noise,
    side_by_side,
    stacked,
    under_a_mask,
    under_controlnet,
    under_lora,
    until,
)
from tests.nodes.test_prompt import compose, spans, stock


@pytest.mark.parametrize(
    ("sampler", "negative_text", "size"),
    [("euler", "ugly", (8, 12)), ("heun", LONG, (13, 9)), ("dpmpp_2m", "ugly", (16, 6))],
)
def test_swap_equals_explicit_probabilities(host, small, sampler, negative_text, size):
    source, edited = stock(host, small.clip, SOURCE), stock(host, small.clip, SWAPPED)
    prompts = [source[0][0], edited[0][0]]
    explicit = ExplicitAttention(prompts, cross=follow(torch.eye(77), until(0.7)), self_=inject(0.4)).on(small.model)
    settings = {"sampler_name": sampler, "negative": stock(host, small.clip, negative_text)}
    latent = side_by_side(height=size[0], width=size[1])
    expected = sample(host, small, stacked(source, edited), latent, model=explicit, **settings)
    inputs = {"cross_end": 0.7, "self_end": 0.4, "texts": (SOURCE, SWAPPED)}
    conditioning, latent = pair(host, small, source, edited, empty(*size), **inputs)
    assert latent["batch_index"] == [0, 0]
    model, calls = counted(small.model)
    actual = sample(host, small, conditioning, latent, model=model, **settings)
    close(actual, expected)
    close(actual[:1], sample(host, small, source, empty(*size), **settings), 1e-4)
    differ(sample(host, small, stacked(source, edited), latent, **settings)[1], expected[1])
    assert set(calls) == {4}


@pytest.mark.parametrize("graph", [plain, under_lora, under_controlnet, under_a_mask, beside_other_patches])
def test_refine_equals_explicit_probabilities(host, small, graph):
    """A subject is inserted; with weights and with parts of the steps for single words."""
    source, edited = inserted(host, small)
    snow, subject = spans(edited)["snow"], list(range(2, 18))

    def alpha(step, steps):
        share = KNOWN * until(0.8)(step, steps)
        share[list(snow)] = until(0.4)(step, steps)[0]
        return share

    weighted = factors_at([(subject, 1.7), (snow, -0.5)])
    cross = follow(SUBJECT_MAPPER, alpha, weighted)
    bare, negative, model = graph(host, small, stacked(source, edited))
    explicit = ExplicitAttention([source[0][0], edited[0][0]], cross, inject(0.7)).on(model)
    expected = sample(host, small, bare, side_by_side(), model=explicit, negative=negative)
    inputs = {"self_end": 0.7, "weights": "<subject>:1.7, snow:-0.5", "word_steps": "snow:0.4", "texts": (SOURCE, "")}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    conditioning, negative, model = graph(host, small, conditioning)
    actual = sample(host, small, conditioning, latent, model=model, negative=negative)
    close(actual, expected)
    alone, negative, model = graph(host, small, source)
    close(actual[:1], sample(host, small, alone, model=model, negative=negative), 1e-4)


def added_twenty_times(host, small):
    """Subject Prompt Compose with its 20 repetitions: both prompts are cut at 75 tokens."""
    source, edited = (
        compose(host, small, small.subject, prompt=text, repetitions=20)[0]
        for text in ("on a chair", "in a red hat on a chair")
    )
    pairs = [(each, each) for each in range(18)]  # <bos>, a, <subject>
    for repetition in range(6):
        first, edited_first = 17 + 6 * repetition, 17 + 10 * repetition  # a dog | in a red hat | on a chair ,
        pairs += [(first, edited_first), (first + 1, edited_first + 1)]
        pairs += [(first + 2 + each, edited_first + 6 + each) for each in range(4)]
    return source, edited, [*pairs[:-1], (76, 76)]  # the last comma is behind the cut


def added_and_taken_away(host, small):
    """Two prompts of as many words, of which most stand elsewhere: big is new."""
    source, edited = (stock(host, small.clip, text) for text in ADDED_AND_TAKEN_AWAY)
    pairs = [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), *[(each, each) for each in range(6, 77)]]
    return source, edited, pairs


ADDED_AND_TAKEN_AWAY = ("a cat on a red chair", "a big cat on a chair")


@pytest.mark.parametrize(
    ("prompts", "texts"), [(added_twenty_times, ("", "")), (added_and_taken_away, ADDED_AND_TAKEN_AWAY)]
)
def test_prompts_of_as_many_words_are_no_swap_where_words_are_added(host, small, prompts, texts):
    source, edited, pairs = prompts(host, small)
    mapper = torch.zeros(77, 77)
    mapper[tuple(zip(*dict.fromkeys(pairs), strict=True))] = 1
    cross = follow(mapper, lambda step, steps: mapper.sum(dim=0) * until(0.8)(step, steps))
    explicit = ExplicitAttention([source[0][0], edited[0][0]], cross, inject(0.4)).on(small.model)
    expected = sample(host, small, stacked(source, edited), side_by_side(), model=explicit)
    close(sample(host, small, *pair(host, small, source, edited, texts=texts)), expected)


@pytest.mark.parametrize(
    "inputs",
    [
        {"cross_end": 0.0, "self_end": 0.0},
        {"cross_end": 0.3, "cross_start": 0.5, "self_end": 0.0, "weights": "snow:1"},
        {"cross_end": 0.0, "self_end": 0.0, "blend_words": "dog", "blend_threshold": 0.0},
        {"cross_end": 0.3, "self_end": 0.3, "word_steps": "dog:0.2"},  # of three steps: none
    ],
)
def test_neutral_settings_are_the_plain_batch(host, small, inputs):
    source, edited = inserted(host, small)
    conditioning, latent = pair(host, small, source, edited, texts=(SOURCE, ""), **inputs)
    expected = sample(host, small, stacked(source, edited), side_by_side())
    assert (sample(host, small, conditioning, latent) - expected).abs().max() == 0.0


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_source_that_is_its_own_edit_is_the_plain_batch(host, small, sampler):
    source, edited = inserted(host, small)
    for each, text in ((source, SOURCE), (edited, "")):
        inputs = {"blend_words": "snow", "blend_threshold": 0.5, "texts": (text, text)}
        conditioning, latent = pair(host, small, each, each, **inputs)
        expected = sample(host, small, stacked(each, each), side_by_side(), sampler_name=sampler)
        assert (sample(host, small, conditioning, latent, sampler_name=sampler) - expected).abs().max() == 0.0


def test_an_unguided_source_is_what_it_is_without_cfg(host, small):
    source, edited = inserted(host, small)
    inverted = {"samples": torch.randn(empty()["samples"].shape, generator=torch.Generator().manual_seed(1))}
    both = pair(host, small, source, edited, inverted, (SOURCE, ""), source_unguided=True)
    sampled = sample_without_noise(host, small, *both)
    close(sampled[:1], sample_without_noise(host, small, source, inverted, cfg=1.0), 1e-4)
    differ(sampled[:1], sample_without_noise(host, small, source, inverted))
    differ(sampled[1:], sample_without_noise(host, small, *both, cfg=1.0)[1:])
