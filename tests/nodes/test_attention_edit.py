"""Attention Re-weight Edit, Prompt-to-Prompt Edit and Edit Mask in the host's own samplers.

The truth is a stock graph whose MODEL attends with explicit probabilities (tests/nodes/explicit.py).
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests import oracle
from tests.nodes.conftest import SIZES
from tests.nodes.explicit import ExplicitAttention, ExplicitBlend, copies, follow, inject
from tests.nodes.test_prompt import compose, spans, stock
from tests.random_weights import write_hub_folder
from tools.host import comfyui_path

#: Attention at the latent's size, at half and at a quarter of it, as SD1.5 has it.
LEVELS = dataclasses.replace(SIZES, unet_channels=(32, 32, 32), unet_attention=(True, True, True))
LONG = "very " * 80  # of two blocks
SOURCE, SWAPPED = "a dog in the snow", "a cat in the snow"


@pytest.fixture(scope="module")
def small(host, tmp_path_factory) -> SimpleNamespace:
    """A model of three levels, its CLIP and a subject."""
    pipeline = oracle.pipeline(LEVELS, tmp_path_factory.mktemp("editing"), comfyui_path())
    folder = host.base / "models" / "blip_diffusion" / "editing"
    write_hub_folder(pipeline, folder, controlnet=oracle.controlnet(LEVELS))
    model, clip, _, qformer = host.run("BLIPDiffusionLoader", checkpoint="editing")
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    subject, _ = host.run("BLIPDiffusionSubjectEncode", qformer=qformer, image=image, subject_word="dog")
    return SimpleNamespace(model=model, clip=clip, subject=subject, negative=stock(host, clip, "ugly"))


def empty(height=8, width=12, rows=1):
    return {"samples": torch.zeros(rows, 4, height, width)}


def draw(host, small, positive, latent=None, model=None, negative=None, **settings) -> torch.Tensor:
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


def reweight(host, conditioning, weights, **inputs):
    return host.run("BLIPDiffusionAttentionReweight", conditioning=conditioning, weights=weights, **inputs)[0]


def close(actual, expected, tolerance=1e-3):
    """Within a part of the latents' own spread."""
    torch.testing.assert_close(actual, expected, atol=tolerance * expected.std().item(), rtol=0)


def differ(one, other):
    assert (one - other).abs().mean() > 0.01 * other.std()


def scaled(factors):
    """The published controller of re-weighting, over the steps ``factors`` says: (step, steps) -> [tokens]."""

    def edit(maps, step, steps, *edges):
        for copy in copies(maps, len(factors(step, steps))):
            copy.mul_(factors(step, steps))

    return edit


def factors_at(positions_and_weights, tokens=77):
    factors = torch.ones(tokens)
    for positions, weight in positions_and_weights:
        factors[list(positions)] = weight
    return factors


# Attention Re-weight Edit


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
    expected = draw(host, small, positive, model=explicit, **settings)
    edited = reweight(host, positive, "<subject>:0.4, snow:-1.5, hat#2:3", start=start, end=end)
    close(draw(host, small, edited, **settings), expected)
    differ(draw(host, small, positive, **settings), expected)


def test_phrases_and_words_of_several_tokens_of_a_stock_conditioning(host, small):
    text = "a labradoodle in a (red hat:1.3)"
    positive = stock(host, small.clip, text)
    weighted = factors_at([((2, 3), 2.0), ((6, 7), 0.1)])
    explicit = ExplicitAttention([positive[0][0]], cross=scaled(lambda *step: weighted)).on(small.model)
    edited = reweight(host, positive, "Labradoodle:2, red hat:0.1", clip=small.clip, text=text)
    close(draw(host, small, edited), draw(host, small, positive, model=explicit))


@pytest.mark.parametrize("inputs", [{"weights": ""}, {"weights": "snow:1"}, {"weights": "snow:2", "end": 0.0}])
def test_neutral_weights_give_the_conditioning_back(host, small, inputs):
    positive, _ = compose(host, small, small.subject)
    assert reweight(host, positive, **inputs) is positive


def test_outside_its_steps_an_edit_changes_nothing(host, small):
    positive, _ = compose(host, small, small.subject)
    edited = reweight(host, positive, "snow:5", end=0.3)  # of three steps: none
    assert edited[0][1]["hooks"]
    assert (draw(host, small, edited) - draw(host, small, positive)).abs().max() == 0.0


def test_two_edits_multiply(host, small):
    positive, _ = compose(host, small, small.subject)
    twice = reweight(host, reweight(host, positive, "snow:2, <subject>:3"), "snow:0.25")
    once = reweight(host, positive, "snow:0.5, <subject>:3")
    close(draw(host, small, twice), draw(host, small, once), 1e-5)


def counted(model):
    """A copy of a MODEL and a list of how many pictures each call of its U-Net had."""
    calls = []

    def count(function, arguments):
        calls.append(len(arguments["input"]))
        return function(arguments["input"], arguments["timestep"], **arguments["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(count)
    return model, calls


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


def plain(host, small, positive):
    return positive, small.negative, small.model


def under_lora(host, small, positive):
    return *with_lora(host, small, positive, small.negative), small.model


def under_two_loras(host, small, positive):
    return *with_lora(host, small, positive), *with_lora(host, small, small.negative), small.model


def under_controlnet(host, small, positive):
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
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:48, 40:90] = 1
    (masked,) = host.run(
        "ConditioningSetMask", conditioning=positive, mask=mask, strength=1.0, set_cond_area="mask bounds"
    )
    whole = stock(host, small.clip, "grass")
    return host.run("ConditioningCombine", conditioning_1=masked, conditioning_2=whole)[0], small.negative, small.model


def with_more_words_behind(host, small, positive):
    more = stock(host, small.clip, "and much more")
    (longer,) = host.run("ConditioningConcat", conditioning_to=positive, conditioning_from=more)
    return longer, small.negative, small.model


def beside_other_patches(host, small, positive):
    """What packs such as IPAdapter do to a MODEL: more tokens by a patch, another attention by a replacement."""
    from comfy.ldm.modules.attention import optimized_attention

    def append(places, context, values, extra_options):
        behind = torch.ones_like(context[:, :4])
        return places, torch.cat([context, behind], dim=1), torch.cat([values, 2 * behind], dim=1)

    def replace(query, key, values, extra_options):
        return (
            optimized_attention(query, key, values, extra_options["n_heads"], transformer_options=extra_options) + query
        )

    model = small.model.clone()
    model.set_model_attn2_patch(append)
    model.set_model_attn2_replace(replace, "input", 1)
    model.set_model_attn2_replace(replace, "output", 2, 0)
    return positive, small.negative, model


COMPANY = [
    plain,
    under_lora,
    under_controlnet,
    in_an_area,
    beside_a_negative_with_an_area,
    under_a_mask,
    with_more_words_behind,
    beside_other_patches,
]


@pytest.mark.parametrize("company", COMPANY)
def test_reweight_in_company(host, small, company):
    """Edited alone: the rows of that prompt, in whatever else the graph does."""
    positive, _ = compose(host, small, small.subject)
    weighted = factors_at([(range(2, 18), 0.3), (spans(positive)["snow"], 4.0)])

    bare, negative, model = company(host, small, positive)
    weighted = torch.nn.functional.pad(weighted, (0, bare[0][0].shape[1] - 77), value=1.0)
    explicit = ExplicitAttention([positive[0][0]], cross=scaled(lambda *step: weighted)).on(model)
    expected = draw(host, small, bare, model=explicit, negative=negative)
    model, calls_without = counted(model)
    differ(draw(host, small, bare, model=model, negative=negative), expected)

    edited, negative, model = company(host, small, reweight(host, positive, "<subject>:0.3, snow:4"))
    model, calls = counted(model)
    close(draw(host, small, edited, model=model, negative=negative), expected)
    assert calls == calls_without  # positive and negative stay one call


@pytest.mark.parametrize(
    ("company", "mode"), [(plain, "MinVram"), (under_lora, "MinVram"), (under_two_loras, "MaxSpeed")]
)
@pytest.mark.parametrize("node", ["reweight", "record"])
def test_hooks_are_cached_as_without_ours(host, small, company, mode, node):
    """The host caches the weights of hooks for two groups and more, and counts ours among them."""
    import comfy.hooks

    positive, _ = compose(host, small, small.subject)
    before = {
        "reweight": lambda: reweight(host, positive, "snow:4"),
        "record": lambda: host.run("BLIPDiffusionAttentionRecord", conditioning=positive)[0],
    }
    edited, negative, model = company(host, small, before[node]())
    modes = []

    def note(function, arguments):
        modes.append(model.hook_mode)
        return function(arguments["input"], arguments["timestep"], **arguments["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(note)
    found = model.hook_mode
    draw(host, small, edited, model=model, negative=negative)
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


# Prompt-to-Prompt Edit


def pair(host, small, source, edited, latent=None, texts=("", ""), **inputs):
    return host.run(
        "BLIPDiffusionPromptToPrompt",
        source=source,
        edited=edited,
        latent=latent or empty(),
        clip=small.clip,
        source_text=texts[0],
        edited_text=texts[1],
        **inputs,
    )


def stacked(*conditionings):
    """The plain batch of conditionings."""
    return [[torch.cat([each[0][0] for each in conditionings]), {}]]


def side_by_side(count=2, **size):
    return {**empty(rows=count, **size), "batch_index": [0] * count}


def until(end):
    """1 for every token in the first part of the steps."""
    return lambda step, steps: torch.full((77,), float(step < int(end * steps + 1e-4)))


KNOWN = torch.ones(77)
KNOWN[2:18] = 0  # the tokens that a subject brings have no source
SUBJECT_MAPPER = torch.zeros(77, 77)
SUBJECT_MAPPER[[0, 1, *range(2, 61)], [0, 1, *range(18, 77)]] = 1


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
    expected = draw(host, small, stacked(source, edited), latent, model=explicit, **settings)
    inputs = {"cross_end": 0.7, "self_end": 0.4, "texts": (SOURCE, SWAPPED)}
    conditioning, latent = pair(host, small, source, edited, empty(*size), **inputs)
    assert latent["batch_index"] == [0, 0]
    model, calls = counted(small.model)
    actual = draw(host, small, conditioning, latent, model=model, **settings)
    close(actual, expected)
    close(actual[:1], draw(host, small, source, empty(*size), **settings), 1e-4)
    differ(draw(host, small, stacked(source, edited), latent, **settings)[1], expected[1])
    assert set(calls) == {4}


def inserted(host, small):
    """A source, and the same with a subject."""
    return stock(host, small.clip, SOURCE), compose(host, small, small.subject)[0]


@pytest.mark.parametrize("company", [plain, under_lora, under_controlnet, under_a_mask, beside_other_patches])
def test_refine_equals_explicit_probabilities(host, small, company):
    """A subject is inserted; with weights and with parts of the steps for single words."""
    source, edited = inserted(host, small)
    snow, subject = spans(edited)["snow"], list(range(2, 18))

    def alpha(step, steps):
        share = KNOWN * until(0.8)(step, steps)
        share[list(snow)] = until(0.4)(step, steps)[0]
        return share

    weighted = factors_at([(subject, 1.7), (snow, -0.5)])
    cross = follow(SUBJECT_MAPPER, alpha, weighted)
    bare, negative, model = company(host, small, stacked(source, edited))
    explicit = ExplicitAttention([source[0][0], edited[0][0]], cross, inject(0.7)).on(model)
    expected = draw(host, small, bare, side_by_side(), model=explicit, negative=negative)
    inputs = {"self_end": 0.7, "weights": "<subject>:1.7, snow:-0.5", "word_steps": "snow:0.4", "texts": (SOURCE, "")}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    conditioning, negative, model = company(host, small, conditioning)
    actual = draw(host, small, conditioning, latent, model=model, negative=negative)
    close(actual, expected)
    alone, negative, model = company(host, small, source)
    close(actual[:1], draw(host, small, alone, model=model, negative=negative), 1e-4)


def euler(host):
    return host.run("KSamplerSelect", sampler_name="euler")[0]


def custom(host, small, model, conditioning, latent, sampler, steps=3, **inputs):
    (sigmas,) = host.run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
    inputs = {"positive": conditioning, "negative": small.negative, "latent_image": latent, **inputs}
    return host.run("SamplerCustom", model=model, noise_seed=1, cfg=4.0, sampler=sampler, sigmas=sigmas, **inputs)[0]


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
    expected = custom(host, small, model, both, latent, sampler)["samples"]

    inputs = {"blend_threshold": 0.93, "cross_end": 0.5, "self_end": 0.25, "texts": (SOURCE, ""), **inputs}
    conditioning, latent = pair(host, small, source, edited, empty(*size), **inputs)
    drawn = custom(host, small, small.model, conditioning, latent, euler(host))
    close(drawn["samples"], expected)

    mask = blend.mask(size)
    assert 0 < mask.mean() < 1
    outside = mask == 0
    assert torch.equal(drawn["samples"][1][:, outside], drawn["samples"][0][:, outside])
    assert not torch.equal(drawn["samples"][1], drawn["samples"][0])
    (shown,) = host.run("BLIPDiffusionEditMask", latent=drawn)
    assert torch.equal(shown, mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[None])


@pytest.mark.parametrize("sampler", ["heun", "uni_pc", "euler_ancestral"])
def test_local_blend_keeps_the_background_in_every_sampler(host, small, sampler):
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.93}
    conditioning, latent = pair(host, small, source, edited, empty(20, 28), **inputs)
    (chosen,) = host.run("KSamplerSelect", sampler_name=sampler)
    drawn = custom(host, small, small.model, conditioning, latent, chosen)
    mask = host.run("BLIPDiffusionEditMask", latent=drawn)[0][0, ::8, ::8] == 1
    one, other = drawn["samples"]
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
    expected = custom(host, small, explicit.on(small.model), both, side_by_side(), sampler, steps=4)["samples"]

    inputs = {"texts": (SOURCE, ""), "cross_end": 1.0, "self_end": 0.0, "blend_words": "dog"}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    model, calls = counted(small.model)
    local_blend = host.module("nodes.host.attention.local_blend").LocalBlend
    monkeypatch.setattr(local_blend, "masks", lambda self: {1: masks[len(calls) - 1][None]} if calls else {})
    close(custom(host, small, model, conditioning, latent, euler(host), steps=4)["samples"], expected)


def inpainting(height, width):
    """A picture of which a part is drawn anew."""
    mask = torch.zeros(1, 1, 8 * height, 8 * width)
    mask[..., 40:120, 30:200] = 1
    picture = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(4))
    return {"samples": picture, "noise_mask": mask}


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
    expected = custom(host, small, model, stacked(source, edited), latent, sampler)
    close(custom(host, small, small.model, conditioning, latent, euler(host))["samples"], expected["samples"])


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
    custom(host, small, small.model, conditioning, both, chosen, steps=6)
    assert len(steps) == 6 and len({mask.sum().item() for _, mask in steps}) > 1
    for (one, other), mask in steps:
        close(other[:, ~mask], one[:, ~mask], 1e-5)
        differ(other[:, mask], one[:, mask])


def test_local_blend_in_a_model_that_does_not_go_down_to_a_quarter(host, small, loaded):
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.9}
    drawn = custom(host, small, loaded.model, *pair(host, small, source, edited, **inputs), euler(host))
    (mask,) = host.run("BLIPDiffusionEditMask", latent=drawn)
    assert 0 < mask.mean() < 1


def test_local_blend_beside_a_prompt_for_an_area(host, small):
    """Whose maps are smaller, and not looked at."""
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.93}
    conditioning, latent = pair(host, small, source, edited, empty(20, 28), **inputs)
    grass = stock(host, small.clip, "grass")
    (area,) = host.run("ConditioningSetArea", conditioning=grass, width=64, height=64, x=32, y=0, strength=1.0)
    (both,) = host.run("ConditioningCombine", conditioning_1=area, conditioning_2=conditioning)
    drawn = custom(host, small, small.model, both, latent, euler(host))
    mask = host.run("BLIPDiffusionEditMask", latent=drawn)[0][0, ::8, ::8] == 1
    one, other = drawn["samples"]
    assert 0 < mask.float().mean() < 1
    assert torch.equal(one[:, ~mask], other[:, ~mask]) and not torch.equal(one[:, mask], other[:, mask])


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
    expected = draw(host, small, stacked(source, edited), side_by_side())
    assert (draw(host, small, conditioning, latent) - expected).abs().max() == 0.0


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_source_that_is_its_own_edit_is_the_plain_batch(host, small, sampler):
    source, edited = inserted(host, small)
    for each, text in ((source, SOURCE), (edited, "")):
        inputs = {"blend_words": "snow", "blend_threshold": 0.5, "texts": (text, text)}
        conditioning, latent = pair(host, small, each, each, **inputs)
        expected = draw(host, small, stacked(each, each), side_by_side(), sampler_name=sampler)
        assert (draw(host, small, conditioning, latent, sampler_name=sampler) - expected).abs().max() == 0.0


def test_an_unguided_source_is_what_it_is_without_cfg(host, small):
    source, edited = inserted(host, small)
    inverted = {"samples": torch.randn(empty()["samples"].shape, generator=torch.Generator().manual_seed(1))}
    both = pair(host, small, source, edited, inverted, (SOURCE, ""), source_unguided=True)
    drawn = draw_without_noise(host, small, *both)
    close(drawn[:1], draw_without_noise(host, small, source, inverted, cfg=1.0), 1e-4)
    differ(drawn[:1], draw_without_noise(host, small, source, inverted))
    differ(drawn[1:], draw_without_noise(host, small, *both, cfg=1.0)[1:])


def test_an_unguided_source_needs_a_sampler_without_noise(host, small):
    both = pair(host, small, *inserted(host, small), texts=(SOURCE, ""), source_unguided=True)
    with pytest.raises(ValueError, match="adds noise to the latent of DDIM Inversion.*add_noise disabled"):
        draw(host, small, *both)
    with pytest.raises(ValueError, match="euler_ancestral adds noise at every step.*choose ddim"):
        draw_without_noise(host, small, *both, sampler_name="euler_ancestral")


def draw_without_noise(host, small, positive, latent, **settings) -> torch.Tensor:
    """As a photograph is drawn again from what DDIM Inversion found."""
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


def test_several_edits_of_several_pictures_are_those_of_each_alone(host, small):
    """[source, edit, edit_2] of picture 5 and of picture 2."""
    source, edited = inserted(host, small)
    swapped = stock(host, small.clip, SWAPPED)
    inputs = {"texts": (SOURCE, f"\n{SWAPPED}"), "weights": "cat:2", "blend_words": "<subject>, cat"}
    latent = {"samples": torch.rand(2, 4, 8, 12), "batch_index": [5, 2], "noise_mask": torch.ones(2, 1, 64, 96)}
    conditioning, together = pair(host, small, source, edited, latent, edited_2=swapped, **inputs)
    assert together["batch_index"] == [5, 5, 5, 2, 2, 2]
    drawn = custom(
        host, small, small.model, conditioning, together, host.run("KSamplerSelect", sampler_name="euler")[0]
    )
    (masks,) = host.run("BLIPDiffusionEditMask", latent=drawn)
    assert masks.shape == (4, 64, 96)
    for picture in range(2):
        alone = {name: value[picture : picture + 1] for name, value in latent.items()}
        for number, (other, text, words) in enumerate([(edited, "", "<subject>"), (swapped, SWAPPED, "cat")], start=1):
            settings = {"texts": (SOURCE, text), "blend_words": words, "weights": "cat:2" if number == 2 else ""}
            conditioning, one = pair(host, small, source, other, alone, **settings)
            expected = custom(host, small, small.model, conditioning, one, euler(host))
            close(drawn["samples"][[3 * picture, 3 * picture + number]], expected["samples"])
            (mask,) = host.run("BLIPDiffusionEditMask", latent=expected)
            assert torch.equal(masks[2 * picture + number - 1], mask[0])


def test_weights_of_a_prompt_stay_with_its_picture(host, small):
    """Attention Re-weight Edit before this node is what the node's own weights are."""
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, "")}
    before = pair(host, small, source, reweight(host, edited, "snow:3"), **inputs)
    own = pair(host, small, source, edited, weights="snow:3", **inputs)
    drawn = draw(host, small, *before)
    close(drawn, draw(host, small, *own), 1e-6)
    louder = reweight(host, source, "dog:3", clip=small.clip, text=SOURCE)
    drawn = draw(host, small, *pair(host, small, louder, edited, cross_end=0.0, self_end=0.0, **inputs))
    close(drawn[:1], draw(host, small, louder), 1e-4)
    close(drawn[1:], draw(host, small, edited), 1e-4)


def test_runs_do_not_disturb_each_other(host, small):
    """One conditioning in several runs of different sizes, as cached nodes are used; each finds its own mask."""
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, ""), "blend_words": "<subject>", "blend_threshold": 0.7}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    first = custom(host, small, small.model, conditioning, latent, euler(host))
    large = {**latent, "samples": torch.zeros(2, 4, 12, 12)}
    second = custom(host, small, small.model, conditioning, large, euler(host))
    again = custom(host, small, small.model, conditioning, latent, euler(host))
    assert torch.equal(again["samples"], first["samples"])
    masks = [host.run("BLIPDiffusionEditMask", latent=each)[0] for each in (first, second)]
    assert [mask.shape for mask in masks] == [(1, 64, 96), (1, 96, 96)]
    fresh = custom(host, small, small.model, *pair(host, small, source, edited, empty(12, 12), **inputs), euler(host))
    assert torch.equal(fresh["samples"], second["samples"])


# Input that cannot be used


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


@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_another_model_is_refused_when_sampling_starts(host, small, monkeypatch, name):
    import comfy.supported_models

    edited = reweight(host, compose(host, small, small.subject)[0], "snow:2")
    config = getattr(comfy.supported_models, name)
    monkeypatch.setattr(small.model.model, "model_config", config.__new__(config))
    with pytest.raises(ValueError, match=f"This model is {name}, but Attention Re-weight Edit and Prompt-to-Prompt"):
        draw(host, small, edited)


def test_conditionings_that_do_not_fit_are_refused(host, small):
    source, edited = inserted(host, small)
    (combined,) = host.run("ConditioningCombine", conditioning_1=edited, conditioning_2=edited)
    rows = [[edited[0][0].repeat(3, 1, 1), edited[0][1]]]
    controlled, _, _ = under_controlnet(host, small, edited)
    before, _ = pair(host, small, edited, edited)
    for other, sentence in (
        (combined, "edited is combined of 2 conditionings and source of 1"),
        (rows, "edited has 3 rows, but each picture of the edit has one prompt"),
        (stock(host, small.clip, LONG), "edited has 154 tokens and source 77"),
        (controlled, "edited and source differ in control"),
        (before, "edited comes from another Prompt-to-Prompt Edit"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pair(host, small, source, other, texts=(SOURCE, LONG))
    with pytest.raises(ValueError, match="edited_2 has 154 tokens"):
        pair(host, small, source, edited, edited_2=stock(host, small.clip, LONG), texts=(SOURCE, f"\n{LONG}"))
    with pytest.raises(ValueError, match="comes from Prompt-to-Prompt Edit and holds several prompts"):
        reweight(host, before, "snow:2")


def test_what_other_packs_leave_in_conditionings_is_compared_by_its_numbers(host, small):
    """Also where tensors are in lists and dictionaries, which cannot be compared as a whole."""
    source, edited = inserted(host, small)

    def with_foreign(conditioning, last):
        foreign = {"images": [torch.ones(2, 3), (torch.zeros(3), torch.full((2,), last))], "strength": 0.5}
        return [[tensor, {**options, "foreign": foreign}] for tensor, options in conditioning]

    conditioning, _ = pair(host, small, with_foreign(source, 1.0), with_foreign(edited, 1.0), texts=(SOURCE, ""))
    assert "foreign" in conditioning[0][1]
    with pytest.raises(ValueError, match="edited and source differ in foreign"):
        pair(host, small, with_foreign(source, 1.0), with_foreign(edited, 2.0), texts=(SOURCE, ""))


@pytest.mark.parametrize(
    "other", [None, [], [torch.ones(2)], [torch.ones(2), 2], [torch.ones(3), 1], [1, torch.ones(2)]]
)
def test_containers_are_compared_by_what_is_in_them(host, other):
    same = host.module("nodes.host.attention.batching").have_same_contents
    one, equal = [torch.ones(2), 1], [torch.ones(2), 1]
    for within in (lambda value: value, lambda value: {"a": value}, lambda value: (None, value)):
        assert same(within(one), within(equal))
        assert not same(within(one), within(other)) and not same(within(other), within(one))
    assert not same({"a": one}, {"b": one})


def test_a_batch_that_cannot_be_paired_is_refused(host, small):
    source, edited = inserted(host, small)
    conditioning, latent = pair(host, small, source, edited, texts=(SOURCE, ""))
    with pytest.raises(ValueError, match=r"The sampler draws 1 picture\(s\), but .* needs 2 side by side"):
        draw(host, small, conditioning)
    (longer,) = host.run("ConditioningConcat", conditioning_to=conditioning, conditioning_from=conditioning)
    with pytest.raises(ValueError, match="had 2 rows of 77 tokens and now has 2 of 154"):
        draw(host, small, longer, latent)
    three, _ = pair(host, small, source, edited, edited_2=edited, texts=(SOURCE, ""))
    (both,) = host.run("ConditioningCombine", conditioning_1=conditioning, conditioning_2=three)
    with pytest.raises(ValueError, match="Prompt-to-Prompt Edits of 2 and 3 pictures are combined"):
        draw(host, small, both, side_by_side(6))


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
        draw(host, small, conditioning, latent, model=model)


def test_local_blend_that_cannot_be_is_refused(host, small):
    source, edited = inserted(host, small)
    conditioning, latent = pair(host, small, source, edited, texts=(SOURCE, ""), blend_words="dog")
    (area,) = host.run("ConditioningSetArea", conditioning=conditioning, width=48, height=64, x=32, y=0, strength=1.0)
    with pytest.raises(ValueError, match="Local blend of Prompt-to-Prompt Edit needs a prompt for the whole picture"):
        draw(host, small, area, latent)
    for each in (latent, empty()):
        with pytest.raises(ValueError, match="This latent was not drawn with local blend: write blend_words"):
            host.run("BLIPDiffusionEditMask", latent=each)


def test_a_watched_prompt_is_refused_with_what_to_do(host, small):
    source, edited = inserted(host, small)
    watched, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=edited, clip=small.clip, text=SOURCE)
    with pytest.raises(ValueError, match="comes from Record Attention: put that behind this node"):
        pair(host, small, source, watched, texts=(SOURCE, ""))
