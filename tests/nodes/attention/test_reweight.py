"""Attention Re-weight Edit in the host's own samplers, against explicit probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.nodes.attention.explicit import ExplicitAttention
from tests.nodes.attention.graphs import (
    LONG,
    SOURCE,
    beside_a_negative_with_an_area,
    beside_other_patches,
    close,
    counted,
    differ,
    factors_at,
    in_an_area,
    inserted,
    pair,
    plain,
    reweight,
    sample,
    scaled,
    under_a_mask,
    under_controlnet,
    under_lora,
    with_more_words_behind,
)
from tests.nodes.test_prompt import compose, spans, stock


@pytest.mark.parametrize(
    ("sampler", "negative_text", "start", "end"),
    [("euler", "ugly", 0.0, 1.0), ("heun", LONG, 0.0, 0.7), ("dpmpp_2m", "ugly", 0.3, 1.0)],
)
def test_reweight_equals_explicit_probabilities(host, small, sampler, negative_text, start, end):
    """Over a whole run, with first- and second-order samplers and next to a negative prompt of two blocks."""
    positive, _ = compose(host, small, small.subject, prompt="in the snow, in a hat", repetitions=20)
    negative = stock(host, small.clip, negative_text)
    found = [(span.word, span.positions) for span in positive[0][1]["blip_token_spans"]]
    snow = [position for word, positions in found if word == "snow" for position in positions]
    hats = [positions for word, positions in found if word == "hat"]
    assert len(snow) > 4
    weighted = factors_at([(range(2, 18), 0.4), (snow, -1.5), (hats[1], 3.0)])

    def factors(step, steps):
        return weighted if int(start * steps) <= step < int(end * steps) else torch.ones(77)

    explicit = ExplicitAttention([positive[0][0]], cross=scaled(factors)).on(small.model)
    settings = {"sampler_name": sampler, "negative": negative}
    expected = sample(host, small, positive, model=explicit, **settings)
    edited = reweight(host, positive, "<subject>:0.4, snow:-1.5, hat#2:3", start=start, end=end)
    close(sample(host, small, edited, **settings), expected)
    differ(sample(host, small, positive, **settings), expected)


def test_phrases_and_words_of_several_tokens_of_a_stock_conditioning(host, small):
    text = "a labradoodle in a (red hat:1.3)"
    positive = stock(host, small.clip, text)
    weighted = factors_at([((2, 3), 2.0), ((6, 7), 0.1)])
    explicit = ExplicitAttention([positive[0][0]], cross=scaled(lambda *step: weighted)).on(small.model)
    edited = reweight(host, positive, "Labradoodle:2, red hat:0.1", clip=small.clip, text=text)
    close(sample(host, small, edited), sample(host, small, positive, model=explicit))


@pytest.mark.parametrize(("text", "first"), [("a dog in the snow", 6), ("a dog " + "and " * 73, 76)])
def test_the_end_of_a_prompt_is_its_eos_and_padding(host, small, text, first):
    """A prompt that fills its block has one such token."""
    positive = stock(host, small.clip, text)
    weighted = factors_at([(range(first, 77), 0.0), ([2], 2.0)])
    explicit = ExplicitAttention([positive[0][0]], cross=scaled(lambda *step: weighted)).on(small.model)
    expected = sample(host, small, positive, model=explicit)
    edited = reweight(host, positive, "<end>:0, dog:2", clip=small.clip, text=text)
    close(sample(host, small, edited), expected)
    differ(sample(host, small, positive), expected)


@pytest.mark.parametrize("inputs", [{"weights": ""}, {"weights": "snow:1"}, {"weights": "snow:2", "end": 0.0}])
def test_neutral_weights_give_the_conditioning_back(host, small, inputs):
    positive, _ = compose(host, small, small.subject)
    assert reweight(host, positive, **inputs) is positive


def test_outside_its_steps_an_edit_changes_nothing(host, small):
    positive, _ = compose(host, small, small.subject)
    edited = reweight(host, positive, "snow:5", end=0.3)  # of three steps: none
    assert edited[0][1]["hooks"]
    assert (sample(host, small, edited) - sample(host, small, positive)).abs().max() == 0.0


def test_two_edits_multiply(host, small):
    positive, _ = compose(host, small, small.subject)
    twice = reweight(host, reweight(host, positive, "snow:2, <subject>:3"), "snow:0.25")
    once = reweight(host, positive, "snow:0.5, <subject>:3")
    close(sample(host, small, twice), sample(host, small, once), 1e-5)


GRAPHS = [
    plain,
    under_lora,
    under_controlnet,
    in_an_area,
    beside_a_negative_with_an_area,
    under_a_mask,
    with_more_words_behind,
    beside_other_patches,
]


@pytest.mark.parametrize("graph", GRAPHS)
def test_reweight_in_other_graphs(host, small, graph):
    """Edited alone: the rows of that prompt, in whatever else the graph does."""
    positive, _ = compose(host, small, small.subject)
    weighted = factors_at([(range(2, 18), 0.3), (spans(positive)["snow"], 4.0)])

    bare, negative, model = graph(host, small, positive)
    weighted = torch.nn.functional.pad(weighted, (0, bare[0][0].shape[1] - 77), value=1.0)
    explicit = ExplicitAttention([positive[0][0]], cross=scaled(lambda *step: weighted)).on(model)
    expected = sample(host, small, bare, model=explicit, negative=negative)
    model, calls_without = counted(model)
    differ(sample(host, small, bare, model=model, negative=negative), expected)

    edited, negative, model = graph(host, small, reweight(host, positive, "<subject>:0.3, snow:4"))
    model, calls = counted(model)
    close(sample(host, small, edited, model=model, negative=negative), expected)
    assert calls == calls_without  # positive and negative stay one call


def test_words_that_are_not_there_are_named(host, small):
    source, edited = inserted(host, small)
    sentence = 'There is no "cat" in this prompt; its words are: a, <subject>, dog, in, the, snow.'
    with pytest.raises(ValueError, match=sentence):
        reweight(host, edited, "snow:2, cat:2")
    for inputs in ({"weights": "cat:2"}, {"blend_words": "cat"}, {"word_steps": "cat:0.5"}):
        with pytest.raises(ValueError, match=sentence):
            pair(host, small, source, edited, texts=(SOURCE, ""), **inputs)
    with pytest.raises(
        ValueError, match='There is no "<subject>" in this prompt; its words are: a, dog, in, the, snow'
    ):
        pair(host, small, source, edited, texts=(SOURCE, ""), source_blend_words="<subject>")
    with pytest.raises(ValueError, match='"snow=2" is no word with a weight'):
        reweight(host, edited, "snow=2")


def test_a_stock_conditioning_needs_its_text(host, small):
    positive = stock(host, small.clip, SOURCE)
    for inputs in ({}, {"clip": small.clip}, {"text": SOURCE}):
        with pytest.raises(ValueError, match="This conditioning does not say which token is which word"):
            reweight(host, positive, "snow:2", **inputs)
    with pytest.raises(ValueError, match="The text makes 154 tokens and the conditioning has 77"):
        reweight(host, positive, "snow:2", clip=small.clip, text=LONG)
    other = SimpleNamespace(tokenize=lambda text: {"g": [[]], "l": [[]]})
    with pytest.raises(ValueError, match="This CLIP is CLIP-G \\+ CLIP-L, but attention is edited in SD1.5"):
        reweight(host, positive, "snow:2", clip=other, text=SOURCE)
