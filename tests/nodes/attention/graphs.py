"""Stock graphs with a small model of three levels, for the tests of edited attention."""

from __future__ import annotations

import torch

from tests.nodes.attention.explicit import copies
from tests.nodes.test_prompt import compose, stock

LONG = "very " * 80  # of two blocks
SOURCE, SWAPPED = "a dog in the snow", "a cat in the snow"

KNOWN = torch.ones(77)
KNOWN[2:18] = 0  # the tokens that a subject brings have no source
SUBJECT_MAPPER = torch.zeros(77, 77)
SUBJECT_MAPPER[[0, 1, *range(2, 61)], [0, 1, *range(18, 77)]] = 1


# Latents and conditionings.


def empty(height=8, width=12, rows=1):
    """An empty LATENT."""
    return {"samples": torch.zeros(rows, 4, height, width)}


def side_by_side(count=2, **size):
    """The empty LATENT of a group, whose images have the same noise."""
    return {**empty(rows=count, **size), "batch_index": [0] * count}


def inpainting(height, width):
    """Latents of an image of which a part is sampled anew."""
    mask = torch.zeros(1, 1, 8 * height, 8 * width)
    mask[..., 40:120, 30:200] = 1
    samples = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(4))
    return {"samples": samples, "noise_mask": mask}


def inserted(host, small):
    """A source, and the same with a subject."""
    return stock(host, small.clip, SOURCE), compose(host, small, small.subject)[0]


def stacked(*conditionings):
    """The plain batch of conditionings."""
    return [[torch.cat([each[0][0] for each in conditionings]), {}]]


# Nodes of the pack and samplers of the host.


def reweight(host, conditioning, weights, **inputs):
    """Run Attention Re-weight Edit."""
    return host.run("BLIPDiffusionAttentionReweight", conditioning=conditioning, weights=weights, **inputs)[0]


def pair(host, small, source, edited, latent=None, texts=("", ""), **inputs):
    """Run Prompt-to-Prompt Edit and return conditioning and latent."""
    return host.run(
        "BLIPDiffusionPromptToPrompt",
        source=source,
        edited=edited,
        latent=latent or empty(),
        clip=small.clip,
        source_text=texts[0],
        edited_text=texts[1],
        **inputs,
    )[:2]


def sample(host, small, positive, latent=None, model=None, negative=None, **settings) -> torch.Tensor:
    """Run KSampler and return the latents."""
    settings = {"steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", **settings}
    return host.run(
        "KSampler",
        model=model or small.model,
        seed=3,
        positive=positive,
        negative=negative or small.negative,
        latent_image=latent or empty(),
        denoise=1.0,
        **settings,
    )[0]["samples"]


def sample_without_noise(host, small, positive, latent, **settings) -> torch.Tensor:
    """Run KSampler (Advanced) as a photograph is sampled again from its inverted latent, and return the latents."""
    settings = {"steps": 3, "cfg": 4.0, "sampler_name": "ddim", "scheduler": "ddim_uniform", **settings}
    return host.run(
        "KSamplerAdvanced",
        model=small.model,
        add_noise="disable",
        noise_seed=0,
        positive=positive,
        negative=small.negative,
        latent_image=latent,
        start_at_step=0,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        **settings,
    )[0]["samples"]


def sample_custom(host, small, model, conditioning, latent, sampler, steps=3, **inputs):
    """Run SamplerCustom and return its LATENT."""
    (sigmas,) = host.run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
    inputs = {"positive": conditioning, "negative": small.negative, "latent_image": latent, **inputs}
    return host.run("SamplerCustom", model=model, noise_seed=1, cfg=4.0, sampler=sampler, sigmas=sigmas, **inputs)[0]


def euler(host):
    """The SAMPLER of that name."""
    return host.run("KSamplerSelect", sampler_name="euler")[0]


def counted(model):
    """A copy of a MODEL and a list of how many rows each call of its U-Net had."""
    calls = []

    def count(function, arguments):
        calls.append(len(arguments["input"]))
        return function(arguments["input"], arguments["timestep"], **arguments["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(count)
    return model, calls


# What a graph may do to a conditioning: functions of (host, small, positive) that return positive, negative and MODEL.


def plain(host, small, positive):
    """The conditioning alone."""
    return positive, small.negative, small.model


def under_lora(host, small, positive):
    """Positive and negative with the same LoRA."""
    return *with_lora(host, small, positive, small.negative), small.model


def under_two_loras(host, small, positive):
    """Positive and negative with a LoRA each."""
    return *with_lora(host, small, positive), *with_lora(host, small, small.negative), small.model


def with_lora(host, small, *conditionings):
    """Conditionings with one group of hooks that patches the U-Net's weights, as a LoRA's does."""
    import comfy.hooks

    name = "diffusion_model.input_blocks.1.1.proj_in.weight"
    shape = small.model.model.state_dict()[name].shape
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    hooks.hooks[0].weights, hooks.hooks[0].need_weight_init = {name: ("diff", (torch.full(shape, 0.05),))}, False
    return [
        host.run("ConditioningSetProperties", cond_NEW=each, hooks=hooks, strength=1.0)[0] for each in conditionings
    ]


def under_controlnet(host, small, positive):
    """Positive and negative with a ControlNet."""
    (control_net,) = host.run("BLIPDiffusionControlNetLoader", checkpoint="editing")
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(5))
    inputs = {"control_net": control_net, "image": image, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    both = host.run("ControlNetApplyAdvanced", positive=positive, negative=small.negative, **inputs)
    return *both, small.model


def in_an_area(host, small, positive):
    """Beside another prompt for the whole; the host gives the negative a copy of the entry with the area."""
    (area,) = host.run("ConditioningSetArea", conditioning=positive, width=48, height=64, x=32, y=0, strength=1.0)
    whole = stock(host, small.clip, "grass " * 80)
    return host.run("ConditioningCombine", conditioning_1=area, conditioning_2=whole)[0], small.negative, small.model


def beside_a_negative_with_an_area(host, small, positive):
    """Here the host gives the positive a copy with the negative's area."""
    inputs = {"width": 48, "height": 64, "x": 32, "y": 0, "strength": 1.0}
    return positive, host.run("ConditioningSetArea", conditioning=small.negative, **inputs)[0], small.model


def under_a_mask(host, small, positive):
    """The conditioning in a mask, and another prompt for the whole."""
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:48, 40:90] = 1
    (masked,) = host.run(
        "ConditioningSetMask", conditioning=positive, mask=mask, strength=1.0, set_cond_area="mask bounds"
    )
    whole = stock(host, small.clip, "grass")
    return host.run("ConditioningCombine", conditioning_1=masked, conditioning_2=whole)[0], small.negative, small.model


def with_more_words_behind(host, small, positive):
    """Another conditioning concatenated behind it."""
    more = stock(host, small.clip, "and much more")
    (longer,) = host.run("ConditioningConcat", conditioning_to=positive, conditioning_from=more)
    return longer, small.negative, small.model


def beside_other_patches(host, small, positive):
    """What packs such as IPAdapter do to a MODEL: more tokens by a patch, another attention by a replacement."""
    from comfy.ldm.modules.attention import optimized_attention

    def append(query, context, values, extra_options):
        behind = torch.ones_like(context[:, :4])
        return query, torch.cat([context, behind], dim=1), torch.cat([values, 2 * behind], dim=1)

    def replace(query, key, values, extra_options):
        return (
            optimized_attention(query, key, values, extra_options["n_heads"], transformer_options=extra_options) + query
        )

    model = small.model.clone()
    model.set_model_attn2_patch(append)
    model.set_model_attn2_replace(replace, "input", 1)
    model.set_model_attn2_replace(replace, "output", 2, 0)
    return positive, small.negative, model


# What explicit attention does, and how results are compared.


def scaled(factors):
    """The published controller of re-weighting, over the steps ``factors`` says: (step, steps) -> [tokens]."""

    def edit(maps, step, steps, *edges):
        for copy in copies(maps, len(factors(step, steps))):
            copy.mul_(factors(step, steps))

    return edit


def factors_at(positions_and_weights, tokens=77):
    """A factor for each token, 1 where no position has a weight."""
    factors = torch.ones(tokens)
    for positions, weight in positions_and_weights:
        factors[list(positions)] = weight
    return factors


def until(end):
    """1 for every token in the first part of the steps."""
    return lambda step, steps: torch.full((77,), float(step < int(end * steps + 1e-4)))


def close(actual, expected, tolerance=1e-3):
    """Assert equality within a part of the latents' own spread."""
    torch.testing.assert_close(actual, expected, atol=tolerance * expected.std().item(), rtol=0)


def differ(one, other):
    """Assert that two results are visibly different."""
    assert (one - other).abs().mean() > 0.01 * other.std()


def in_windows(model, starts, length):
    """A copy of a MODEL that samples a batch in windows, each a call of its own, as AnimateDiff nodes do."""
    import comfy.samplers

    def call(arguments):
        outputs = [torch.zeros_like(arguments["input"]) for _ in arguments["conds"]]
        for start in starts:
            window = slice(start, start + length)
            latents, sigma = arguments["input"][window], arguments["sigma"][window]
            parts = comfy.samplers.calc_cond_batch(
                arguments["model"], arguments["conds"], latents, sigma, arguments["model_options"]
            )
            for output, part in zip(outputs, parts, strict=True):
                output[window] = part
        return outputs

    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(call)
    return model
