"""Local blend of Prompt-to-Prompt Edit, and Edit Mask, against the published local blend."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.explicit import ExplicitAttention, ExplicitBlend, follow, inject
from tests.nodes.attention.graphs import (
    KNOWN,
    SOURCE,
    SUBJECT_MAPPER,
    close,
    counted,
    differ,
    empty,
    euler,
    inpainting,
    inserted,
    pair,
    sample,
    sample_custom,
    side_by_side,
    stacked,
    until,
)
from tests.nodes.test_prompt import stock


@pytest.mark.parametrize(
    ("words", "inputs", "size"),
    [
        (([], [*range(2, 18)]), {"blend_words": "<subject>"}, (20, 28)),
        (([2, 5], []), {"source_blend_words": "dog, snow"}, (26, 18)),
        (([2], [18, 21]), {"source_blend_words": "dog", "blend_words": "dog, snow", "blend_threshold": 0.97}, (25, 21)),
    ],
)
def test_local_blend_equals_explicit_probabilities(host, small, words, inputs, size):
    import comfy.samplers

    source, edited = inserted(host, small)
    blend = ExplicitBlend(words, inputs.get("blend_threshold", 0.93))
    cross = follow(SUBJECT_MAPPER, lambda *step: KNOWN * until(0.5)(*step), seen=blend.see)
    blend.attention = ExplicitAttention([source[0][0], edited[0][0]], cross, inject(0.25))
    both, model = stacked(source, edited), blend.attention.on(small.model)
    sampler = comfy.samplers.KSAMPLER(blend.sample)
    latent = side_by_side(height=size[0], width=size[1])
    expected = sample_custom(host, small, model, both, latent, sampler)["samples"]

    inputs = {"blend_threshold": 0.93, "cross_end": 0.5, "self_end": 0.25, "texts": (SOURCE, ""), **inputs}
    conditioning, latent = pair(host, small, source, edited, empty(*size), **inputs)
    sampled = sample_custom(host, small, small.model, conditioning, latent, euler(host))
    close(sampled["samples"], expected)

    mask = blend.mask(size)
    assert 0 < mask.mean() < 1
    outside = mask == 0
    assert torch.equal(sampled["samples"][1][:, outside], sampled["samples"][0][:, outside])
    assert not torch.equal(sampled["samples"][1], sampled["samples"][0])
    (shown,) = host.run("BLIPDiffusionEditMask", latent=sampled)
    assert torch.equal(shown, mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[None])


@pytest.mark.parametrize("sampler", ["heun", "uni_pc", "euler_ancestral"])
def test_local_blend_keeps_the_background_in_every_sampler(host, small, sampler):
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.93}
    conditioning, latent = pair(host, small, source, edited, empty(20, 28), **inputs)
    (chosen,) = host.run("KSamplerSelect", sampler_name=sampler)
    sampled = sample_custom(host, small, small.model, conditioning, latent, chosen)
    mask = host.run("BLIPDiffusionEditMask", latent=sampled)[0][0, ::8, ::8] == 1
    one, other = sampled["samples"]
    assert 0 < mask.float().mean() < 1
    assert torch.equal(one[:, ~mask], other[:, ~mask])
    assert not torch.equal(one[:, mask], other[:, mask])


def test_local_blend_begins_at_the_source_where_a_mask_comes_back(host, small, monkeypatch):
    """As the paper's does, whose sampler forgets what an edit was outside the mask."""
    import comfy.samplers

    left = torch.zeros(8, 12, dtype=torch.bool)
    left[:, :6] = True
    masks = [left | True, left, left | True, left | True]
    source, edited = inserted(host, small)
    explicit = ExplicitAttention([source[0][0], edited[0][0]], follow(SUBJECT_MAPPER, lambda *step: KNOWN))
    blend, each_step = ExplicitBlend(([], []), 0.5), iter(masks)
    blend.mask = lambda size: next(each_step).float()
    sampler, both = comfy.samplers.KSAMPLER(blend.sample), stacked(source, edited)
    expected = sample_custom(host, small, explicit.on(small.model), both, side_by_side(), sampler, steps=4)["samples"]

    inputs = {"texts": (SOURCE, ""), "cross_end": 1.0, "self_end": 0.0, "blend_words": "dog"}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    model, calls = counted(small.model)
    local_blend = host.module("nodes.host.attention.local_blend").LocalBlend
    monkeypatch.setattr(local_blend, "masks", lambda self: {1: masks[len(calls) - 1][None]} if calls else {})
    close(sample_custom(host, small, model, conditioning, latent, euler(host), steps=4)["samples"], expected)


def test_local_blend_of_an_inpainting_equals_explicit_probabilities(host, small):
    """Where the host hands the model a copy of the sampler's latents."""
    import comfy.samplers

    source, edited = inserted(host, small)
    blend = ExplicitBlend(([], [*range(2, 18)]), 0.93)
    cross = follow(SUBJECT_MAPPER, lambda *step: KNOWN * until(0.5)(*step), seen=blend.see)
    blend.attention = ExplicitAttention([source[0][0], edited[0][0]], cross, inject(0.25))
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.93}
    conditioning, latent = pair(host, small, source, edited, inpainting(20, 28), cross_end=0.5, self_end=0.25, **inputs)
    model, sampler = blend.attention.on(small.model), comfy.samplers.KSAMPLER(blend.sample)
    expected = sample_custom(host, small, model, stacked(source, edited), latent, sampler)
    close(sample_custom(host, small, small.model, conditioning, latent, euler(host))["samples"], expected["samples"])


@pytest.mark.parametrize("latent", [empty, inpainting])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "sa_solver", "uni_pc"])
def test_local_blend_reaches_every_sampler_in_every_step(host, small, monkeypatch, sampler, latent):
    """Also those that hand the model a copy of their latents; what they go on from is blended."""
    attention = host.module("nodes.host.attention.sampling_run")
    runs, steps = [], []

    def begin(*args):
        runs.append(attention.AttentionRun(*args))
        return runs[-1]

    def note(step, denoised, *_):
        steps.append((denoised.clone(), runs[-1].local_blend.masks()[1][0]))

    monkeypatch.setattr(host.module("nodes.host.attention.hooks"), "AttentionRun", begin)
    monkeypatch.setattr("latent_preview.prepare_callback", lambda *_: note)
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.93}
    conditioning, both = pair(host, small, source, edited, latent(20, 28), **inputs)
    (chosen,) = host.run("KSamplerSelect", sampler_name=sampler)
    sample_custom(host, small, small.model, conditioning, both, chosen, steps=6)
    assert len(steps) == 6
    assert len({mask.sum().item() for _, mask in steps}) > 1
    for (one, other), mask in steps:
        close(other[:, ~mask], one[:, ~mask], 1e-5)
        differ(other[:, mask], one[:, mask])


def test_local_blend_in_a_model_that_does_not_go_down_to_a_quarter(host, small, loaded):
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.9}
    sampled = sample_custom(host, small, loaded.model, *pair(host, small, source, edited, **inputs), euler(host))
    (mask,) = host.run("BLIPDiffusionEditMask", latent=sampled)
    assert 0 < mask.mean() < 1


def test_local_blend_beside_a_prompt_for_an_area(host, small):
    """The smaller maps of the area are not used."""
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.93}
    conditioning, latent = pair(host, small, source, edited, empty(20, 28), **inputs)
    grass = stock(host, small.clip, "grass")
    (area,) = host.run("ConditioningSetArea", conditioning=grass, width=64, height=64, x=32, y=0, strength=1.0)
    (both,) = host.run("ConditioningCombine", conditioning_1=area, conditioning_2=conditioning)
    sampled = sample_custom(host, small, small.model, both, latent, euler(host))
    mask = host.run("BLIPDiffusionEditMask", latent=sampled)[0][0, ::8, ::8] == 1
    one, other = sampled["samples"]
    assert 0 < mask.float().mean() < 1
    assert torch.equal(one[:, ~mask], other[:, ~mask])
    assert not torch.equal(one[:, mask], other[:, mask])


def test_local_blend_that_cannot_be_is_refused(host, small):
    source, edited = inserted(host, small)
    conditioning, latent = pair(host, small, source, edited, texts=(SOURCE, ""), blend_words="dog")
    (area,) = host.run("ConditioningSetArea", conditioning=conditioning, width=48, height=64, x=32, y=0, strength=1.0)
    with pytest.raises(ValueError, match="Local blend of Prompt-to-Prompt Edit needs the whole picture at once"):
        sample(host, small, area, latent)
    for each in (latent, empty()):
        with pytest.raises(ValueError, match="This latent was not drawn with local blend: write blend_words"):
            host.run("BLIPDiffusionEditMask", latent=each)
