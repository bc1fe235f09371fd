"""Record Attention and local blend where guiders and guidance predict more than once: only the prompt's own counts.

The oracle is a plain CFGGuider that makes the same predictions.
"""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.graphs import SOURCE, close, differ, empty, inserted, pair
from tests.nodes.test_prompt import compose, stock

SIZE = (8, 12)
WORDS = ("<subject>", "dog", "snow")


def record(host, conditioning, **inputs):
    """Run Record Attention and return conditioning and record."""
    return host.run("BLIPDiffusionAttentionRecord", conditioning=conditioning, **inputs)[:2]


def guide(host, model, node, **inputs):
    """A GUIDER of the host."""
    return host.run(node, model=model, **inputs)[0]


def sample(host, guider, model, latent=None):
    """Run SamplerCustomAdvanced and return its LATENT."""
    (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
    (sigmas,) = host.run("BasicScheduler", model=model, scheduler="normal", steps=3, denoise=1.0)
    (noise,) = host.run("RandomNoise", noise_seed=1)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}
    return host.run("SamplerCustomAdvanced", **inputs, latent_image=latent or empty())[0]


def same_maps(record, expected, words=WORDS):
    """Assert that two records hold the same maps, which show something."""
    for word in words:
        maps = expected.word_map(word, *SIZE)
        assert maps.std() > 0
        torch.testing.assert_close(record.word_map(word, *SIZE), maps, atol=1e-5, rtol=0)


@pytest.fixture
def positive(host, small):
    """A prompt with a subject."""
    return compose(host, small, small.subject)[0]


def plain_record(host, small, positive, cfg):
    """The record and the latents of a CFGGuider."""
    watched, expected = record(host, positive)
    guider = guide(host, small.model, "CFGGuider", positive=watched, negative=small.negative, cfg=cfg)
    return expected, sample(host, guider, small.model)["samples"]


@pytest.mark.parametrize("style", ["regular", "nested"])
@pytest.mark.parametrize("wired", [False, True])
def test_dual_cfg_records_cond1(host, small, positive, style, wired):
    """With the negative's prompt in cond2, it is cfg with the negative; nested at cfg_cond2_negative 1."""
    inputs = {"model": small.model} if wired else {}
    watched, found, model = host.run("BLIPDiffusionAttentionRecord", conditioning=positive, **inputs)
    model = model if wired else small.model
    scales = {"cfg_conds": 4.0, "cfg_cond2_negative": 1.0 if style == "nested" else 3.0, "style": style}
    dual = {"cond1": watched, "cond2": small.negative, "negative": small.negative, **scales}
    sampled = sample(host, guide(host, model, "DualCFGGuider", **dual), model)["samples"]
    expected, latents = plain_record(host, small, positive, 4.0)
    close(sampled, latents, 1e-4)
    same_maps(found, expected)


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_records_cond2(host, small, positive, style):
    """With the same prompt in cond1, which is not recorded, it is cfg with cfg_cond2_negative."""
    watched, found = record(host, positive)
    dual = {"cond1": positive, "cond2": watched, "negative": small.negative, "style": style}
    guider = guide(host, small.model, "DualCFGGuider", **dual, cfg_conds=4.0, cfg_cond2_negative=3.0)
    sampled = sample(host, guider, small.model)["samples"]
    expected, latents = plain_record(host, small, positive, 3.0)
    close(sampled, latents, 1e-4)
    same_maps(found, expected)


@pytest.mark.parametrize("node", ["DualCFGGuider", "CFGGuider"])
def test_on_two_sides_the_first_is_recorded(host, small, positive, node):
    """Not the sum of both."""
    watched, found = record(host, positive)
    expected_from, expected = record(host, positive)
    dual = {"negative": small.negative, "style": "regular", "cfg_conds": 4.0, "cfg_cond2_negative": 3.0}
    for first, second in ((watched, watched), (expected_from, positive)):
        inputs = {"cond1": first, "cond2": second, **dual}
        if node == "CFGGuider":
            inputs = {"positive": first, "negative": second, "cfg": 4.0}
        sample(host, guide(host, small.model, node, **inputs), small.model)
    same_maps(found, expected)


def test_the_negative_is_recorded_where_it_stands(host, small, positive):
    """Its rows, and not the positive's."""
    watched, found = record(host, positive)
    other = stock(host, small.clip, "grass")
    guider = guide(host, small.model, "CFGGuider", positive=other, negative=watched, cfg=-3.0)
    sampled = sample(host, guider, small.model)["samples"]
    expected_from, expected = record(host, positive)
    mirrored = guide(host, small.model, "CFGGuider", positive=expected_from, negative=other, cfg=4.0)
    close(sampled, sample(host, mirrored, small.model)["samples"], 1e-4)
    same_maps(found, expected)


# Guidance that calls the U-Net once more. The oracle is handed the same predictions without such calls.


def kept(model):
    """A copy of a MODEL, and the list of the predictions that leave its guidance."""
    predictions = []

    def keep(arguments):
        predictions.append(arguments["denoised"].clone())
        return arguments["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(keep)
    return model, predictions


def replayed(model, predictions):
    """A copy of a MODEL whose guidance makes those predictions."""
    remaining = iter(predictions)
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda arguments: next(remaining))
    return model


EXTRA = {"PerturbedAttentionGuidance": {"scale": 3.0}, "SelfAttentionGuidance": {"scale": 2.0, "blur_sigma": 2.0}}


@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("patch", EXTRA)
def test_what_guidance_predicts_once_more_is_not_recorded(host, small, positive, patch, side):
    other = stock(host, small.clip, "grass")

    def run(model):
        watched, found = record(host, positive)
        sides = {"positive": watched, "negative": other}
        if side == "negative":
            sides = {"positive": other, "negative": watched}
        sampled = sample(host, guide(host, model, "CFGGuider", **sides, cfg=4.0), model, empty(16, 16))["samples"]
        return found, sampled

    patched, predictions = kept(host.run(patch, model=small.model, **EXTRA[patch])[0])
    found, sampled = run(patched)
    expected, latents = run(replayed(small.model, predictions))
    assert torch.equal(sampled, latents)
    differ(sampled, run(small.model)[1])
    same_maps(found, expected)


def test_a_record_and_an_unguided_source_in_one_run(host, small):
    """What the edit predicts once more for itself is not recorded either."""
    source, edited = inserted(host, small)
    zero = {"samples": torch.ones(2, 4, 8, 12), "batch_index": [0, 0]}
    found = []
    for unguided in (True, False):
        inputs = {"source_unguided": unguided, "cross_end": 0.0, "self_end": 0.0, "weights": "snow:1.01"}
        conditioning, _ = pair(host, small, source, edited, empty(), (SOURCE, ""), **inputs)
        watched, each = record(host, conditioning, clip=small.clip, text=SOURCE)
        (sampler,) = host.run("KSamplerSelect", sampler_name="ddim")
        (sigmas,) = host.run("BasicScheduler", model=small.model, scheduler="normal", steps=1, denoise=1.0)
        guider = guide(host, small.model, "CFGGuider", positive=watched, negative=small.negative, cfg=4.0)
        inputs = {"noise": host.run("DisableNoise")[0], "guider": guider, "sampler": sampler, "sigmas": sigmas}
        host.run("SamplerCustomAdvanced", **inputs, latent_image=zero)
        found.append(each)
    same_maps(*found, words=("dog", "snow"))


def test_local_blend_takes_its_masks_from_the_prompts_own_predictions(host, small):
    """Under PAG they are those of a run without its calls and with its predictions."""
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.95}
    conditioning, latent = pair(host, small, source, edited, empty(16, 16), **inputs)

    def run(model):
        guider = guide(host, model, "CFGGuider", positive=conditioning, negative=small.negative, cfg=4.0)
        sampled = sample(host, guider, model, latent)
        return sampled["samples"], host.run("BLIPDiffusionEditMask", latent=sampled)[0]

    (patched,) = host.run("PerturbedAttentionGuidance", model=small.model, scale=3.0)
    patched, predictions = kept(patched)
    sampled, mask = run(patched)
    latents, expected = run(replayed(small.model, predictions))
    assert torch.equal(sampled, latents)
    assert torch.equal(mask, expected)
    assert 0 < mask.mean() < 1
