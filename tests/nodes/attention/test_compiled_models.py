"""Edits and records on models of the stock TorchCompileModel: as without it, and nothing is compiled for them.

Its node, with a backend that notes what it is given to compile, and would leave it as it is.
"""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.graphs import close, pair, reweight, sample
from tests.nodes.test_prompt import compose, stock

WEIGHTS = {"weights": "<subject>:-3, snow:20", "start": 0.25}  # nothing in the step in which it would be compiled
SOURCE, EDITED = "a dog in the snow", "a cat in the snow"


@pytest.fixture
def positive(host, small):
    return compose(host, small, small.subject)[0]


@pytest.fixture
def compiled():
    """What was compiled."""
    return []


@pytest.fixture
def compile_model(host, compiled):
    """The host's node, called without its list of backends."""

    def backend(graph, inputs, **options):
        compiled.append(graph)
        return graph.forward

    yield lambda model: host.nodes["TorchCompileModel"].execute(model, backend)[0]
    torch.compiler.reset()


@pytest.mark.parametrize("wire", ["", "before", "behind"])
def test_reweight(host, small, positive, compile_model, compiled, wire):
    expected = sample(host, small, reweight(host, positive, **WEIGHTS), steps=4)
    assert (expected - sample(host, small, positive, steps=4)).abs().max() > 0.1 * expected.std()
    model = small.model if wire == "behind" else compile_model(small.model)
    inputs = {"conditioning": positive, **WEIGHTS, **({"model": model} if wire else {})}
    edited, wired = host.run("BLIPDiffusionAttentionReweight", **inputs)
    model = {"": model, "before": wired, "behind": wired}[wire]
    if wire == "behind":
        model = compile_model(model)
    close(sample(host, small, edited, model=model, steps=4), expected)
    assert not compiled
    assert "torch.compile" in str(model.wrappers)  # for the runs without edits


def test_prompt_to_prompt(host, small, compile_model, compiled):
    source, edited = (stock(host, small.clip, text) for text in (SOURCE, EDITED))
    steps = {"cross_end": 0.5, "self_end": 0.5}
    inputs = {"texts": (SOURCE, EDITED), "blend_words": "cat", "blend_threshold": 0.5, **steps}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    expected = sample(host, small, conditioning, latent, steps=4)
    close(sample(host, small, conditioning, latent, model=compile_model(small.model), steps=4), expected)
    assert not compiled


def test_records(host, small, positive, compile_model, compiled):
    maps = []
    for model in (small.model, compile_model(small.model)):
        watched, record, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=positive)
        sample(host, small, watched, model=model, steps=4)
        maps.append(record.word_map("snow", 8, 12))
    torch.testing.assert_close(maps[1], maps[0], atol=1e-6, rtol=0)
    assert not compiled
