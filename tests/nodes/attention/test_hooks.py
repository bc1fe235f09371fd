"""How edits come into and leave the host's sampling runs."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.explicit import ExplicitAttention
from tests.nodes.attention.graphs import (
    SOURCE,
    close,
    differ,
    empty,
    euler,
    factors_at,
    in_windows,
    inserted,
    pair,
    plain,
    reweight,
    sample,
    sample_custom,
    sample_without_noise,
    scaled,
    under_lora,
    under_two_loras,
)
from tests.nodes.test_prompt import compose, spans


@pytest.mark.parametrize(
    ("graph", "mode"), [(plain, "MinVram"), (under_lora, "MinVram"), (under_two_loras, "MaxSpeed")]
)
@pytest.mark.parametrize("node", ["reweight", "record"])
def test_hooks_are_cached_as_without_ours(host, small, graph, mode, node):
    """The host caches the weights of hooks for two groups and more, and counts ours among them."""
    import comfy.hooks

    positive, _ = compose(host, small, small.subject)
    before = {
        "reweight": lambda: reweight(host, positive, "snow:4"),
        "record": lambda: host.run("BLIPDiffusionAttentionRecord", conditioning=positive)[0],
    }
    edited, negative, model = graph(host, small, before[node]())
    modes = []

    def note(function, arguments):
        modes.append(model.hook_mode)
        return function(arguments["input"], arguments["timestep"], **arguments["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(note)
    found = model.hook_mode
    sample(host, small, edited, model=model, negative=negative)
    assert set(modes) == {comfy.hooks.EnumHookMode[mode]}
    assert model.hook_mode == found == comfy.hooks.EnumHookMode.MaxSpeed


def test_every_sampler_node_takes_it(host, small):
    positive, _ = compose(host, small, small.subject)
    weighted = factors_at([(spans(positive)["snow"], 4.0)])
    explicit = ExplicitAttention([positive[0][0]], cross=scaled(lambda *step: weighted)).on(small.model)
    edited = reweight(host, positive, "snow:4")
    (sampler,) = host.run("KSamplerSelect", sampler_name="dpm_2")
    (sigmas,) = host.run("BasicScheduler", model=small.model, scheduler="karras", steps=3, denoise=1.0)
    (noise,) = host.run("RandomNoise", noise_seed=1)

    def advanced(model, conditioning):
        return host.run(
            "KSamplerAdvanced",
            model=model,
            positive=conditioning,
            negative=small.negative,
            latent_image=empty(),
            noise_seed=1,
            steps=4,
            start_at_step=1,
            end_at_step=3,
            sampler_name="euler",
            return_with_leftover_noise="enable",
        )[0]

    def custom(model, conditioning):
        inputs = {"positive": conditioning, "negative": small.negative, "sigmas": sigmas, "latent_image": empty()}
        return host.run("SamplerCustom", model=model, noise_seed=1, cfg=4.0, sampler=sampler, **inputs)[0]

    def guided(model, conditioning):
        (guider,) = host.run("DualCFGGuider", model=model, cond1=conditioning, cond2=positive, negative=small.negative)
        inputs = {"sampler": sampler, "sigmas": sigmas, "latent_image": empty()}
        return host.run("SamplerCustomAdvanced", noise=noise, guider=guider, **inputs)[0]

    for run in (advanced, custom):
        close(run(small.model, edited)["samples"], run(explicit, positive)["samples"])
    differ(guided(small.model, edited)["samples"], guided(small.model, positive)["samples"])


def test_an_unguided_source_needs_a_sampler_without_noise(host, small):
    both = pair(host, small, *inserted(host, small), texts=(SOURCE, ""), source_unguided=True)
    with pytest.raises(ValueError, match="adds noise to the latent of DDIM Inversion.*add_noise disabled"):
        sample(host, small, *both)
    with pytest.raises(ValueError, match="euler_ancestral adds or takes away noise.*choose ddim"):
        sample_without_noise(host, small, *both, sampler_name="euler_ancestral")


def test_runs_do_not_disturb_each_other(host, small):
    """One conditioning in several runs of different sizes, as cached nodes are used; each finds its own mask."""
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.7}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    first = sample_custom(host, small, small.model, conditioning, latent, euler(host))
    large = {**latent, "samples": torch.zeros(2, 4, 12, 12)}
    second = sample_custom(host, small, small.model, conditioning, large, euler(host))
    again = sample_custom(host, small, small.model, conditioning, latent, euler(host))
    assert torch.equal(again["samples"], first["samples"])
    masks = [host.run("BLIPDiffusionEditMask", latent=each)[0] for each in (first, second)]
    assert [mask.shape for mask in masks] == [(1, 64, 96), (1, 96, 96)]
    fresh = sample_custom(
        host, small, small.model, *pair(host, small, source, edited, empty(12, 12), **inputs), euler(host)
    )
    assert torch.equal(fresh["samples"], second["samples"])


@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_another_model_is_refused_when_sampling_starts(host, small, monkeypatch, name):
    import comfy.supported_models

    edited = reweight(host, compose(host, small, small.subject)[0], "snow:2")
    config = getattr(comfy.supported_models, name)
    monkeypatch.setattr(small.model.model, "model_config", config.__new__(config))
    with pytest.raises(
        ValueError, match=f"This model is {name}, but Attention Re-weight Edit, Prompt-to-Prompt Edit and"
    ):
        sample(host, small, edited)


def test_what_repacks_the_batch_is_refused(host, small):
    """Tiles, in which it is not known which row belongs to which prompt."""
    source, edited = inserted(host, small)
    conditioning, latent = pair(host, small, source, edited, texts=(SOURCE, ""))

    def in_tiles(function, arguments):
        c = {**arguments["c"], "c_crossattn": arguments["c"]["c_crossattn"].repeat(2, 1, 1)}
        return function(arguments["input"].repeat(2, 1, 1, 1), arguments["timestep"].repeat(2), **c)[:4]

    model = small.model.clone()
    model.set_model_unet_function_wrapper(in_tiles)
    with pytest.raises(ValueError, match="called with 8 pictures where the sampler has 2 for each of 2 prompts"):
        sample(host, small, conditioning, latent, model=model)


def test_windows_that_part_groups_are_refused(host, small):
    """The second of these windows begins with an edited picture, which would have become the source of its source."""
    source, edited = inserted(host, small)
    conditioning, latent = pair(host, small, source, edited, empty(rows=3), texts=(SOURCE, ""))
    model = in_windows(small.model, [0, 1, 2], 4)
    with pytest.raises(ValueError, match="called with 4 of the sampler's 6 pictures, but Prompt-to-Prompt Edit needs"):
        sample(host, small, conditioning, latent, model=model)


def test_windows_do_not_change_a_reweight(host, small):
    """Each of two windows of two pictures is what the sampler makes of these two without the others."""
    edited = reweight(host, compose(host, small, small.subject)[0], "snow:2")
    latent = {**empty(rows=4), "batch_index": [0, 1, 0, 1]}
    windows = sample(host, small, edited, latent, model=in_windows(small.model, [0, 2], 2))
    alone = sample(host, small, edited, {**empty(rows=2), "batch_index": [0, 1]})
    assert not torch.equal(alone, sample(host, small, compose(host, small, small.subject)[0], empty(rows=2)))
    torch.testing.assert_close(windows, torch.cat([alone, alone]))
