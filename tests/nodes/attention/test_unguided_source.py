"""source_unguided under every guider and guidance patch of the host: the source is what it is alone and unguided."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.graphs import SOURCE, close, differ, empty, inserted, pair
from tests.nodes.test_prompt import stock
from tools.host_versions import NEWER_NODES


def run_patch(host, small, node, **inputs):
    """A MODEL behind a stock node; skips where this version of the host does not have it."""
    if node in NEWER_NODES and node not in host.nodes:
        pytest.skip(f"{node} came in {NEWER_NODES[node]}")
    if "empty_conditioning" in inputs:
        inputs["empty_conditioning"] = stock(host, small.clip, "")
    return host.run(node, model=small.model, **inputs)[0]


def make_guider(host, small, name, model, conditioning):
    """A GUIDER with the conditioning where a graph has its main prompt."""
    other, void = stock(host, small.clip, "grass"), stock(host, small.clip, "")
    inputs = {
        "BasicGuider": {"conditioning": conditioning},
        "CFGGuider": {"positive": conditioning, "negative": small.negative, "cfg": 4.0},
    }
    inputs["PerpNegGuider"] = {**inputs["CFGGuider"], "empty_conditioning": void, "neg_scale": 1.0}
    inputs["DualModelGuider"] = {**inputs["CFGGuider"], "model_negative": small.model.clone()}
    for style in ("regular", "nested"):
        dual = {"negative": small.negative, "cfg_conds": 4.0, "cfg_cond2_negative": 3.0, "style": style}
        inputs[f"DualCFGGuider, {style}"] = {"cond1": conditioning, "cond2": other, **dual}
        inputs[f"DualCFGGuider, {style}, cond2"] = {"cond1": other, "cond2": conditioning, **dual}
    node = name.partition(",")[0]
    if node in NEWER_NODES and node not in host.nodes:
        pytest.skip(f"{node} came in {NEWER_NODES[node]}")
    return host.run(node, model=model, **inputs[name])[0]


def sample(host, guider, latent, model):
    """Run SamplerCustomAdvanced on an inverted latent."""
    (sampler,) = host.run("KSamplerSelect", sampler_name="ddim")
    (sigmas,) = host.run("BasicScheduler", model=model, scheduler="ddim_uniform", steps=3, denoise=1.0)
    inputs = {"noise": host.run("DisableNoise")[0], "guider": guider, "sampler": sampler, "sigmas": sigmas}
    return host.run("SamplerCustomAdvanced", **inputs, latent_image=latent)[0]["samples"]


@pytest.fixture
def group(host, small):
    """A source, a latent to start from, and the group that is sampled from it."""
    source, edited = inserted(host, small)
    start = {"samples": 5 * torch.randn(empty()["samples"].shape, generator=torch.Generator().manual_seed(1))}
    return source, start, pair(host, small, source, edited, start, (SOURCE, ""), source_unguided=True)


def alone(host, small, model, source, start):
    """The source without guidance: by its own prompt alone."""
    return sample(host, make_guider(host, small, "BasicGuider", model, source), start, model)


GUIDERS = [
    "BasicGuider",
    "CFGGuider",
    "DualCFGGuider, regular",
    "DualCFGGuider, regular, cond2",
    "DualCFGGuider, nested",
    "DualCFGGuider, nested, cond2",
    "PerpNegGuider",
    "DualModelGuider",
]

#: Nodes that change how positive and negative are put together; the source is drawn by the model without them. Stock
#: RenormCFG and TemporalScoreRescaling are not among them: they take no batch of two pictures.
GUIDANCE = {
    "APG": {"eta": 0.5, "norm_threshold": 1.0, "momentum": -0.5},
    "CFGNorm": {"strength": 0.7},
    "CFGOverride": {"cfg": 7.0},
    "CFGZeroStar": {},
    "Epsilon Scaling": {"scaling_factor": 1.2},
    "FreSca": {"scale_low": 1.5, "scale_high": 2.0, "freq_cutoff": 2},
    "Mahiro": {},
    "NAGuidance": {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5},
    "PerpNeg": {"empty_conditioning": None, "neg_scale": 1.0},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "RescaleCFG": {"multiplier": 0.7},
    "SelfAttentionGuidance": {"scale": 1.0, "blur_sigma": 2.0},
    "TCFG": {},
    "VideoLinearCFGGuidance": {"min_cfg": 2.0},
    "VideoTriangleCFGGuidance": {"min_cfg": 2.0},
}


@pytest.mark.parametrize("name", GUIDERS)
def test_under_every_guider(host, small, group, name):
    source, start, (conditioning, latent) = group
    sampled = sample(host, make_guider(host, small, name, small.model, conditioning), latent, small.model)
    close(sampled[:1], alone(host, small, small.model, source, start), 1e-4)
    if name != "BasicGuider":
        guided = sample(host, make_guider(host, small, name, small.model, source), start, small.model)
        differ(guided, sampled[:1])


@pytest.mark.parametrize("guider", ["CFGGuider", "DualCFGGuider, regular", "DualCFGGuider, nested", "PerpNegGuider"])
@pytest.mark.parametrize("patch", GUIDANCE)
def test_under_every_guidance_patch(host, small, group, patch, guider):
    source, start, (conditioning, latent) = group
    model = run_patch(host, small, patch, **GUIDANCE[patch])
    sampled = sample(host, make_guider(host, small, guider, model, conditioning), latent, model)
    close(sampled[:1], alone(host, small, small.model, source, start), 1e-4)
    differ(sample(host, make_guider(host, small, guider, model, source), start, model), sampled[:1])


@pytest.mark.parametrize("patch", ["FreeU_V2", "HyperTile", "PatchModelAddDownscale", "UNetCrossAttentionMultiply"])
def test_with_a_patch_of_the_unet_it_is_that_models(host, small, group, patch):
    """What changes the network, and not its guidance, acts on the source as on a picture of its own."""
    source, start, (conditioning, latent) = group
    model = run_patch(host, small, patch, **({"q": 1.2, "k": 0.9, "v": 1.1} if "Multiply" in patch else {}))
    sampled = sample(host, make_guider(host, small, "CFGGuider", model, conditioning), latent, model)
    close(sampled[:1], alone(host, small, model, source, start), 1e-4)


@pytest.mark.parametrize(("scale", "alpha"), [(5.0, 0.5), (3.0, 0.25), (2.0, 0.25), (1.5, 0.1)])
def test_under_weak_nag_too(host, small, group, scale, alpha):
    """At these settings NAG does least in the first, noisiest step, and more later."""
    source, start, (conditioning, latent) = group
    model = run_patch(host, small, "NAGuidance", nag_scale=scale, nag_alpha=alpha, nag_tau=1.5)
    sampled = sample(host, make_guider(host, small, "CFGGuider", model, conditioning), latent, model)
    close(sampled[:1], alone(host, small, small.model, source, start), 1e-4)


def mix_late(out, extra_options):
    """A patch that mixes positive and negative from the second step on."""
    if len(extra_options["cond_or_uncond"]) > 1 and extra_options["sigmas"].max() < 2:  # the first step is 2.9
        return out.roll(len(out) // 2, 0)
    return out


def with_output_patch(model):
    model.set_model_attn2_output_patch(mix_late)


def with_replaced_attention(model):
    from comfy.ldm.modules.attention import optimized_attention

    def replace(query, key, values, extra_options):
        return mix_late(optimized_attention(query, key, values, extra_options["n_heads"]), extra_options)

    for block in (("input", 1), ("input", 2), ("middle", 0), ("output", 2), ("output", 3)):
        model.set_model_attn2_replace(replace, *block)


def with_function_wrapper(model):
    def wrap(function, arguments):
        out = function(arguments["input"], arguments["timestep"], **arguments["c"])
        return mix_late(out, arguments["c"]["transformer_options"])

    model.set_model_unet_function_wrapper(wrap)


def with_wrapper_of_the_network(model):
    def wrap(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        out = executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        return mix_late(out, transformer_options)

    model.add_wrapper_with_key("diffusion_model", "test", wrap)


@pytest.mark.parametrize(
    "add_to", [with_output_patch, with_replaced_attention, with_function_wrapper, with_wrapper_of_the_network]
)
def test_under_patches_that_mix_after_the_first_step(host, small, group, add_to):
    source, start, (conditioning, latent) = group
    model = small.model.clone()
    add_to(model)
    sampled = sample(host, make_guider(host, small, "CFGGuider", model, conditioning), latent, model)
    expected = alone(host, small, small.model, source, start)
    close(sampled[:1], expected, 1e-4)
    both = pair(host, small, source, source, start, (SOURCE, SOURCE), source_unguided=False)
    mixed = sample(host, make_guider(host, small, "CFGGuider", model, both[0]), both[1], model)
    clean = sample(host, make_guider(host, small, "CFGGuider", small.model, both[0]), both[1], small.model)
    differ(mixed, clean)


@pytest.mark.parametrize(
    ("patch", "expected"),
    [(None, [4, 2, 4, 4]), ("RescaleCFG", [4, 2, 4, 4]), ("FreeU_V2", [4, 2] * 3), ("NAGuidance", [4, 2] * 3)],
)
def test_it_costs_one_call_in_a_run_or_behind_a_patch_in_every_step(host, small, group, patch, expected):
    _, _, (conditioning, latent) = group
    model = run_patch(host, small, patch, **GUIDANCE.get(patch, {})) if patch else small.model
    calls = []
    unet = small.model.model.diffusion_model
    counting = unet.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    try:
        sample(host, make_guider(host, small, "CFGGuider", model, conditioning), latent, model)
    finally:
        counting.remove()
    assert calls == expected


def test_a_guider_that_does_not_predict_the_source_is_refused(host, small, group):
    import comfy.samplers

    _, _, (conditioning, latent) = group

    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            return x / 2

    guider = Other(small.model)
    guider.inner_set_conds({"positive": conditioning})
    with pytest.raises(ValueError, match="does not predict the source's prompt for all pictures at once"):
        sample(host, guider, latent, small.model)


def test_a_photograph_inverted_with_guidance_is_refused(host, small):
    """PAG acts at cfg 1 too, and so in the inversion; the source is drawn without it."""
    source, edited = inserted(host, small)
    photograph = {"samples": torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(2))}
    (guided,) = host.run("PerturbedAttentionGuidance", model=small.model, scale=3.0)
    for model, unguided in ((guided, True), (guided, False), (small.model, True)):
        inputs = {"model": model, "conditioning": source, "latent": photograph, "steps": 2}
        inverted, _ = host.run("BLIPDiffusionDDIMInversion", **inputs)
        if model is guided and unguided:
            with pytest.raises(ValueError, match="DDIM Inversion's model comes from a node that changes guidance"):
                pair(host, small, source, edited, inverted, (SOURCE, ""), source_unguided=True)
        else:
            pair(host, small, source, edited, inverted, (SOURCE, ""), source_unguided=unguided)
