"""Subject Regions in the host's own samplers, against a masked sum of whole attentions in each layer."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.attention.explicit import attended, probabilities
from tests.nodes.attention.explicit import begins_with
from tests.nodes.attention.graphs import (
    LONG,
    beside_a_negative_with_an_area,
    beside_other_patches,
    close,
    counted,
    differ,
    empty,
    euler,
    in_an_area,
    in_windows,
    pair,
    plain,
    reweight,
    sample,
    sample_custom,
    sample_without_noise,
    under_a_mask,
    under_controlnet,
    under_lora,
    under_two_loras,
    with_more_words_behind,
)
from tests.nodes.test_prompt import compose, spans, stock

HALVES = "0, 0, 0.5, 1\n0.5, 0, 0.5, 1"


def regions(host, scene, *prompts, **inputs):
    """Run Subject Regions without a soft edge and a base share, and return the conditioning."""
    numbered = {f"region_{number}": prompt for number, prompt in enumerate(prompts, start=1)}
    settings = {"boxes": HALVES, "strengths": "1", "feathers": "0", "base_share": 0.0, "start": 0.0, "end": 1.0}
    return host.run("BLIPDiffusionSubjectRegions", scene=scene, **numbered, **{**settings, **inputs})[0]


class ExplicitRegions:
    """A stock MODEL in whose cross-attentions every prompt is attended to by whole matrices, and weighted by a mask.

    Args:
        scene: Tensor of the scene's prompt, by which its rows are found.
        prompts: Tensors of the regions' prompts.
        weights: (step, steps) -> weights of the scene and of each region, of shape [1 + regions, B or 1, H, W].
        area: Rows and columns of the latents in calls for a part of them.
        edit: Called with the number of a prompt (0: the scene), its A of the rows with the scene's prompt, which it may
            change in place, the step, the number of steps, and the prompt's weights of shape [rows or 1, N, 1].
    """

    def __init__(self, scene, prompts, weights, area=None, edit=None) -> None:
        self.scene, self.prompts, self.weights, self.area, self.edit = scene, prompts, weights, area, edit
        self.rows: list[int] = []

    def on(self, model):
        """A copy of a MODEL that attends like this, around what other packs have put in place of its attentions."""
        from comfy.ldm.modules.attention import SpatialTransformer

        model = model.clone()
        model.add_wrapper_with_key("diffusion_model", "explicit", self.find_rows)
        unet = model.model.diffusion_model
        blocks = {("input", index): each for index, each in enumerate(unet.input_blocks)}
        blocks |= {("middle", 0): unet.middle_block}
        blocks |= {("output", index): each for index, each in enumerate(unet.output_blocks)}
        replaced = dict(model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {}))
        for key in {*blocks, *replaced}:
            for layer in blocks[key[:2]].children():
                if isinstance(layer, SpatialTransformer):
                    attention = partial(self.attend, layer.transformer_blocks[0].attn2, replaced.get(key))
                    model.set_model_attn2_replace(attention, *key)
        return model

    def find_rows(self, executor, x, timesteps, context, *args, **kwargs):
        """Which rows of this call have the scene's prompt."""
        self.rows = [row for row in range(len(context)) if begins_with(context[row], self.scene)]
        self.length = context.shape[1]
        return executor(x, timesteps, context, *args, **kwargs)

    def attend(self, layer, other, query, key, values, extra_options):
        """In place of the host's cross-attention."""
        heads = extra_options["n_heads"]

        sigmas = extra_options["sample_sigmas"]
        step = int((sigmas[:-1] >= extra_options["sigmas"][0] * (1 - 1e-3)).sum()) - 1
        weights = self.weights(step, len(sigmas) - 1)
        if tuple(weights.shape[-2:]) != tuple(extra_options["original_shape"][-2:]):
            weights = weights[..., self.area[0], self.area[1]]
        size = extra_options["activations_shape"][-2:]
        weights = torch.nn.functional.interpolate(weights, size=size, mode="area").flatten(2)[..., None]
        batch = len(query) // len(extra_options["uuids"])
        weights = weights.expand(-1, batch, -1, -1)[:, [row % batch for row in self.rows]]

        def one(number, key, values):
            if other:
                return other(query, key, values, extra_options)
            a = probabilities(query, key, heads)
            if self.edit and self.rows:
                edited = a[self.rows]
                self.edit(number, edited, step, len(sigmas) - 1, weights[number], size)
                a[self.rows] = edited
            return attended(a, values, heads)

        whole = one(0, key, values)
        output = whole.clone()
        output[self.rows] = whole[self.rows] * weights[0]
        for number, prompt in enumerate(self.prompts):
            prompt = prompt.repeat(len(query) // len(prompt) + 1, 1, 1)[: len(query)]
            own_key = torch.cat([layer.to_k(prompt), key[:, self.length :]], dim=1)
            own_values = torch.cat([layer.to_v(prompt), values[:, self.length :]], dim=1)
            attention = one(number + 1, own_key, own_values)
            output[self.rows] += attention[self.rows] * weights[number + 1]
        return output


def halves(height=8, width=12):
    """The scene nowhere, one region on the left and one on the right."""
    weights = torch.zeros(3, 1, height, width)
    weights[1, ..., : width // 2], weights[2, ..., width // 2 :] = 1, 1
    return weights


@pytest.fixture(scope="module")
def prompts(host, small):
    """The prompt of the scene, of a region with a subject, and of one of two blocks."""
    dog = compose(host, small, small.subject, prompt="in the snow", repetitions=1)[0]
    return stock(host, small.clip, "a table in a garden"), dog, stock(host, small.clip, "a cup " + LONG)


def tensors(*conditionings):
    return [conditioning[0][0] for conditioning in conditionings]


# The right picture.


@pytest.mark.parametrize(
    ("sampler", "negative_text", "start", "end"),
    [("euler", "ugly", 0.0, 1.0), ("heun", LONG, 0.0, 0.7), ("dpmpp_2m", "ugly", 0.4, 1.0)],
)
def test_regions_equal_a_masked_sum_of_attentions(host, small, prompts, sampler, negative_text, start, end):
    """Over a whole run, with first- and second-order samplers, prompts of different lengths and ranges of steps."""
    scene, dog, cup = prompts
    only_scene = torch.zeros(3, 1, 8, 12)
    only_scene[0] = 1
    weights = torch.zeros(3, 1, 8, 12)
    weights[1, ..., :6, 1:9], weights[2, ..., 2:, 6:] = 1, 1  # boxes on whole pixels, which overlap
    weights[1:] *= 0.75 / weights[1:].sum(dim=0).clamp_min(1)
    weights[0] = 1 - weights.sum(dim=0)

    def planned(step, steps):
        return weights if int(start * steps) <= step < int(end * steps + 1e-4) else only_scene

    explicit = ExplicitRegions(scene[0][0], tensors(dog, cup), planned).on(small.model)
    settings = {"sampler_name": sampler, "negative": stock(host, small.clip, negative_text)}
    expected = sample(host, small, scene, model=explicit, **settings)
    boxes = f"{1 / 12}, 0, {8 / 12}, 0.75\n0.5, 0.25, 0.5, 0.75"
    edited = regions(host, scene, dog, cup, boxes=boxes, base_share=0.25, start=start, end=end)
    close(sample(host, small, edited, **settings), expected)
    differ(sample(host, small, scene, **settings), expected)


GRAPHS = [
    plain,
    under_lora,
    under_two_loras,
    under_controlnet,
    in_an_area,
    beside_a_negative_with_an_area,
    under_a_mask,
    with_more_words_behind,
    beside_other_patches,
]
AREAS = {
    in_an_area: (slice(0, 8), slice(4, 10)),
    # Here the host samples the scene for the whole and for the area.
    beside_a_negative_with_an_area: (slice(0, 8), slice(4, 10)),
    under_a_mask: (slice(2, 6), slice(5, 12)),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_regions_in_other_graphs(host, small, prompts, graph):
    """The rows of that prompt alone, in as many calls of as many rows."""
    scene, dog, _ = prompts
    cup = stock(host, small.clip, "a cup")
    bare, negative, model = graph(host, small, scene)
    explicit = ExplicitRegions(scene[0][0], tensors(dog, cup), lambda *step: halves(), area=AREAS.get(graph))
    expected = sample(host, small, bare, model=explicit.on(model), negative=negative)
    model, calls_without = counted(model)
    differ(sample(host, small, bare, model=model, negative=negative), expected)

    edited, negative, model = graph(host, small, regions(host, scene, dog, cup))
    model, calls = counted(model)
    close(sample(host, small, edited, model=model, negative=negative), expected)
    assert calls == calls_without


def test_a_word_of_a_region_is_weighted_in_its_region(host, small, prompts):
    scene, dog, _ = prompts
    factors = torch.ones(77)
    factors[list(spans(dog)["snow"])] = 4.0
    factors[2:18] = 0.3

    def edit(number, a, *step):
        if number == 1:
            a.mul_(factors)

    explicit = ExplicitRegions(scene[0][0], tensors(dog, scene), lambda *step: halves(), edit=edit)
    expected = sample(host, small, scene, model=explicit.on(small.model))
    edited = regions(host, scene, reweight(host, dog, "<subject>:0.3, snow:4"), scene)
    close(sample(host, small, edited), expected)
    differ(sample(host, small, regions(host, scene, dog, scene)), expected)


def test_a_record_has_the_words_of_the_scene_and_of_all_regions(host, small, prompts):
    """Each where its prompt counts; the picture is the same to the last bit."""
    scene, dog, _ = prompts
    edited = regions(host, scene, dog, base_share=0.25, end=0.7)
    text = {"clip": small.clip, "text": "a table in a garden"}
    recorded, record, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=edited, **text)
    assert torch.equal(sample(host, small, recorded), sample(host, small, edited))

    seen = {0: [], 1: []}
    columns = {0: [5], 1: list(spans(dog)["snow"])}

    def note(number, a, step, steps, weights, size):
        maps = (a.mean(dim=1)[..., columns[number]].sum(dim=-1, keepdim=True) * weights).transpose(1, 2)
        seen[number].append(torch.nn.functional.interpolate(maps.unflatten(-1, tuple(size)), (64, 96), mode="bilinear"))

    weights = torch.zeros(2, 1, 8, 12)
    weights[1, ..., :6] = 0.75
    weights[0] = 1 - weights[1]
    alone = torch.tensor([1.0, 0.0])[:, None, None, None].expand(2, 1, 8, 12)
    explicit = ExplicitRegions(scene[0][0], tensors(dog), lambda step, steps: weights if step < 2 else alone, edit=note)
    sample(host, small, scene, model=explicit.on(small.model))
    for word, number in (("garden", 0), ("snow", 1)):
        expected = torch.stack(seen[number]).mean(dim=0)[:, 0]
        torch.testing.assert_close(record.word_map(word, 64, 96), expected, atol=1e-4, rtol=1e-3)
    assert record.words() == ["a", "table", "in", "garden", "<subject>", "dog", "the", "snow"]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_one_region_is_edited_while_the_others_stay(host, small, prompts, share):
    """Source and edit have the same scene and the same right half; on the left, one word is swapped."""
    scene, dog, _ = prompts
    rain = compose(host, small, small.subject, prompt="in the rain", repetitions=1)[0]
    cup = compose(host, small, small.subject, prompt="on grass", target_subject="cup", repetitions=1)[0]
    text = "a table in a garden"
    source, edited = (regions(host, scene, each, cup, base_share=share) for each in (dog, rain))
    inputs = {"texts": (text, text), "self_end": 0.0, "weights": "rain:3"}
    conditioning, latent = pair(host, small, source, edited, **inputs)
    sampled = sample(host, small, conditioning, latent)

    factors = torch.ones(77)
    factors[list(spans(rain)["rain"])] = 3.0

    def edit(number, a, step, steps, *more):
        if step < int(0.8 * steps + 1e-4):
            a[1::2] = a[::2]
        if number == 1:
            a[1::2] *= factors

    weights = halves()
    weights[1:] *= 1 - share
    weights[0] = share
    both = [torch.cat(tensors(dog, rain)), torch.cat(tensors(cup, cup))]
    explicit = ExplicitRegions(scene[0][0], both, lambda *step: weights, edit=edit).on(small.model)
    expected = sample(host, small, [[scene[0][0].repeat(2, 1, 1), {}]], latent, model=explicit)
    close(sampled, expected)
    close(sampled[:1], sample(host, small, source))
    differ(sampled[1:], sample(host, small, edited))
    differ(sampled[:1], sampled[1:])


class BlendedEuler:
    """Euler's method on [source, edit] in which every prediction of the edit is mixed with its source's by a mask."""

    def __init__(self, mask) -> None:
        self.mask = mask

    def __call__(self, model, x, sigmas, extra_args, callback=None, disable=None):
        """A sampler function of the host."""
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            denoised = model(x, sigma.expand(len(x)), **extra_args).clone()
            denoised[1] = (1 - self.mask) * denoised[0] + self.mask * denoised[1]
            x = x + (x - denoised) / sigma * (following - sigma)
        return x


@pytest.mark.parametrize("source_has_regions", [True, False])
def test_an_edit_is_kept_to_the_regions(host, small, prompts, source_has_regions):
    """Outside them the source's latents to the last bit, on their soft edges a mixture, inside the edit."""
    import comfy.samplers

    scene, dog, _ = prompts
    cup = compose(host, small, small.subject, prompt="on grass", target_subject="cup", repetitions=1)[0]
    masks = {"mask_1": torch.zeros(1, 8, 12), "mask_2": torch.zeros(1, 8, 12)}
    masks["mask_1"][:, 1:5, :5], masks["mask_1"][:, 5, 1:3], masks["mask_2"][:, 3:, 7:10] = 1, 0.3, 1
    edited = regions(host, scene, dog, cup, boxes="", base_share=0.25, **masks)
    # A source without regions is one whose regions all have its own prompt.
    source = regions(host, scene, cup, dog, boxes="", base_share=0.25, **masks) if source_has_regions else scene
    inputs = {"texts": ("a table in a garden",) * 2, "self_end": 0.0, "cross_end": 0.5}
    conditioning, latent = pair(host, small, source, edited, blend_regions=True, **inputs)
    sampled = sample_custom(host, small, small.model, conditioning, latent, euler(host))

    mask = (masks["mask_1"] + masks["mask_2"])[0]
    everywhere, _ = pair(host, small, source, edited, **inputs)
    blended = comfy.samplers.KSAMPLER(BlendedEuler(mask))
    expected = sample_custom(host, small, small.model, everywhere, latent, blended)["samples"]
    close(sampled["samples"], expected)
    alone = sample_custom(host, small, small.model, source, empty(), euler(host))["samples"]
    close(sampled["samples"][:1], alone, 1e-4)
    one, other = sampled["samples"]
    assert (one - other)[:, mask == 0].abs().max() == 0.0
    differ(other[:, mask == 1], one[:, mask == 1])
    assert not torch.equal(other[:, mask == 0.3], one[:, mask == 0.3])
    (shown,) = host.run("BLIPDiffusionEditMask", latent=sampled)
    close(shown[0, ::8, ::8], mask, 1e-6)
    off, _ = pair(host, small, source, edited, blend_regions=False, **inputs)
    assert torch.equal(sample(host, small, off, latent), sample(host, small, everywhere, latent))


@pytest.mark.parametrize("sampler", ["heun", "uni_pc", "euler_ancestral"])
def test_an_edit_is_kept_to_a_mask_for_each_picture_in_every_sampler(host, small, prompts, sampler):
    scene, dog, _ = prompts
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :4], masks[1, 3:, 6:] = 1, 0.5
    edited = regions(host, scene, dog, boxes="", mask_1=masks, feathers="0.3")
    inputs = {"texts": ("a table in a garden",) * 2, "blend_regions": True}
    conditioning, latent = pair(host, small, scene, edited, empty(rows=2), **inputs)
    (chosen,) = host.run("KSamplerSelect", sampler_name=sampler)
    sampled = sample_custom(host, small, small.model, conditioning, latent, chosen)
    shown = host.run("BLIPDiffusionEditMask", latent=sampled)[0][:, ::8, ::8]
    assert not torch.equal(shown[0], shown[1])
    for mask, one, other in zip(shown, sampled["samples"][::2], sampled["samples"][1::2], strict=True):
        assert 0 < (mask == 0).float().mean() < 1
        assert (one - other)[:, mask == 0].abs().max() == 0.0
        assert not torch.equal(other[:, mask > 0], one[:, mask > 0])


def test_two_things_of_a_photograph_are_replaced(host, small, prompts):
    """An inverted latent comes back as it does alone and unguided, and outside the boxes the edit is the same."""
    scene, dog, _ = prompts
    cup = compose(host, small, small.subject, prompt="on grass", target_subject="cup", repetitions=1)[0]
    edited = regions(host, scene, dog, cup, boxes="0, 0, 0.25, 1\n0.5, 0.5, 0.25, 0.5")
    inverted = {"samples": torch.randn(empty()["samples"].shape, generator=torch.Generator().manual_seed(1))}
    inputs = {"source_unguided": True, "blend_regions": True}
    both = pair(host, small, scene, edited, inverted, ("a table in a garden",) * 2, **inputs)
    one, other = sample_without_noise(host, small, *both)
    close(one[None], sample_without_noise(host, small, scene, inverted, cfg=1.0), 1e-4)
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[:, :3], inside[4:, 6:9] = True, True
    assert (one - other)[:, ~inside].abs().max() == 0.0
    differ(other[:, inside], one[:, inside])


def test_where_words_look_becomes_the_regions(host, small, prompts):
    """The recipe of the help page: Record Attention, a map for each word, Threshold Mask, Subject Regions."""
    _, dog, _ = prompts
    cup = stock(host, small.clip, "a cup")
    scene = compose(host, small, small.subject, prompt="and a cup on a table", repetitions=1)[0]
    recorded, record, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=scene)
    picture = torch.zeros(1, 64, 96, 3)
    drawn = sample(host, small, recorded)
    masks = {}
    for number, word in enumerate(("dog", "cup"), start=1):
        _, mask = host.run("BLIPDiffusionAttentionMap", attention=record, image=picture, words=word, strength=0.6)
        (masks[f"mask_{number}"],) = host.run("ThresholdMask", mask=mask, value=0.4)
        where = record.word_map(word, 64, 96)
        expected = (where - where.min()) / (where.max() - where.min()) > 0.4
        assert torch.equal(masks[f"mask_{number}"], expected.float())
        assert 0 < expected.float().mean() < 1
    assert not torch.equal(*masks.values())
    edited = regions(host, scene, dog, cup, boxes="", **masks)
    differ(sample(host, small, edited), drawn)
    small_masks = [torch.nn.functional.interpolate(mask[None], (8, 12), mode="area")[0] for mask in masks.values()]
    weights = torch.stack([torch.zeros(1, 8, 12), *small_masks])
    weights[1:] /= weights[1:].sum(dim=0).clamp_min(1)
    weights[0] = 1 - weights.sum(dim=0)
    explicit = ExplicitRegions(scene[0][0], tensors(dog, cup), lambda *step: weights).on(small.model)
    close(sample(host, small, edited), sample(host, small, scene, model=explicit))


def test_groups_with_other_regions_are_refused(host, small, prompts):
    scene, dog, cup = prompts
    source = regions(host, scene, dog)
    inputs = {"texts": ("a table in a garden",) * 2}
    for edited, sentence in (
        (scene, "edited has 0 regions and source 1: put both through Subject Regions"),
        (regions(host, scene, dog, boxes="0, 0, 0.4, 1"), "Region 1 of edited and of source are not in the same place"),
        (regions(host, scene, dog, boxes="", mask_1=torch.ones(1, 4, 4) / 2), "are not in the same place"),
        (regions(host, scene, cup), "have 1 x 154 and 1 x 77 tokens: use single subjects"),
        (regions(host, scene, stock(host, small.clip, "a cup")), "do not both say which token is which word"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pair(host, small, source, edited, **inputs)
    with pytest.raises(ValueError, match="Blend words do not work with Subject Regions: empty them, and switch"):
        pair(host, small, source, source, blend_words="table", **inputs)
    with pytest.raises(ValueError, match="blend_regions is on, but edited has no regions"):
        pair(host, small, scene, scene, texts=("a table in a garden",) * 2, blend_regions=True)
    with pytest.raises(ValueError, match='There is no "cat" in this prompt'):
        pair(host, small, source, source, weights="cat:2", **inputs)


def test_weights_behind_are_those_of_the_scene(host, small, prompts):
    """Behind Subject Regions, as before it."""
    scene, dog, _ = prompts
    inputs = {"clip": small.clip, "text": "a table in a garden"}
    before = regions(host, reweight(host, scene, "garden:5", **inputs), dog)
    behind = reweight(host, regions(host, scene, dog), "garden:5", **inputs)
    assert torch.equal(sample(host, small, before), sample(host, small, behind))
    differ(sample(host, small, before), sample(host, small, regions(host, scene, dog)))


def test_masks_of_any_size_and_one_for_each_image(host, small, prompts):
    scene, dog, _ = prompts
    masks = torch.zeros(2, 64, 96)
    masks[0, :, :48], masks[1, :32] = 1, 1
    latent = empty(rows=2)
    latent["batch_index"] = [0, 1]
    sampled = sample(host, small, regions(host, scene, dog, boxes="", mask_1=masks), latent)
    weights = torch.zeros(2, 2, 8, 12)
    weights[1, 0, :, :6], weights[1, 1, :4] = 1, 1
    weights[0] = 1 - weights[1]
    explicit = ExplicitRegions(scene[0][0], tensors(dog), lambda *step: weights).on(small.model)
    expected = sample(host, small, scene, latent, model=explicit)
    close(sampled, expected)
    large = torch.nn.functional.interpolate(masks[:1, None], scale_factor=3)[:, 0]
    small_mask = torch.nn.functional.interpolate(masks[:1, None], size=(2, 4))[:, 0]
    for mask in (large, small_mask, large[None], large[0]):
        close(sample(host, small, regions(host, scene, dog, boxes="", mask_1=mask), latent)[:1], expected[:1])


def test_a_mask_comes_from_where_a_word_of_the_scene_looked(host, small, prompts):
    """Record Attention, Subject Attention Map and the stock Threshold Mask: the layout of a first run."""
    scene, dog, _ = prompts
    text = {"clip": small.clip, "text": "a table in a garden"}
    recorded, record, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=scene, **text)
    sample(host, small, recorded)
    inputs = {"attention": record, "image": torch.zeros(1, 64, 96, 3), "words": "table", "strength": 1.0}
    _, heatmap = host.run("BLIPDiffusionAttentionMap", **inputs)
    (mask,) = host.run("ThresholdMask", mask=heatmap, value=0.5)
    assert 0 < mask.mean() < 1
    covered = mask.reshape(1, 8, 8, 12, 8).mean(dim=(2, 4))
    weights = torch.stack([1 - covered, covered])
    explicit = ExplicitRegions(scene[0][0], tensors(dog), lambda *step: weights).on(small.model)
    expected = sample(host, small, scene, model=explicit)
    close(sample(host, small, regions(host, scene, dog, boxes="", mask_1=mask)), expected)


def test_subjects_of_a_batch_are_one_for_each_image(host, small, prompts):
    scene, dog, _ = prompts
    cup = stock(host, small.clip, "a cup")
    both = [[torch.cat(tensors(dog, cup)), {}]]
    latent = empty(rows=2)
    together = sample(host, small, regions(host, scene, both), latent)
    close(together[:1], sample(host, small, regions(host, scene, dog), latent)[:1])
    close(together[1:], sample(host, small, regions(host, scene, cup), latent)[1:])
    with pytest.raises(ValueError, match=r"The sampler draws 1 picture\(s\), but a prompt of Subject Regions needs 2"):
        sample(host, small, regions(host, scene, both))


def test_odd_sizes_and_layers_made_smaller(host, small, prompts):
    """Latents that the U-Net halves with a remainder, and stock Kohya Deep Shrink, which scales maps between layers."""
    scene, dog, _ = prompts
    (shrunk,) = host.run(
        "PatchModelAddDownscale",
        model=small.model,
        block_number=2,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=0.7,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    )
    for model, size in ((small.model, (9, 13)), (shrunk, (16, 24))):
        weights = torch.zeros(2, 1, *size)
        weights[1, ..., : size[0] // 3, :] = 1
        weights[0] = 1 - weights[1]
        explicit = ExplicitRegions(scene[0][0], tensors(dog), lambda *step: weights).on(model)  # noqa: B023
        expected = sample(host, small, scene, empty(*size), model=explicit)
        edited = regions(host, scene, dog, boxes=f"0, 0, 1, {size[0] // 3 / size[0]}")
        close(sample(host, small, edited, empty(*size), model=model), expected)


def test_regions_of_the_negative(host, small, prompts):
    scene, dog, _ = prompts
    weights = halves()
    weights[0] = weights[2]
    explicit = ExplicitRegions(small.negative[0][0], tensors(dog), lambda *step: weights[:2]).on(small.model)
    expected = sample(host, small, scene, model=explicit)
    close(sample(host, small, scene, negative=regions(host, small.negative, dog)), expected)


def test_every_guider_draws_them(host, small, prompts):
    scene, dog, _ = prompts
    edited = regions(host, scene, dog)
    weights = halves()
    weights[0] = weights[2]
    explicit = ExplicitRegions(scene[0][0], tensors(dog), lambda *step: weights[:2]).on(small.model)
    noise = host.run("RandomNoise", noise_seed=1)[0]

    def guiders(model, positive):
        other = stock(host, small.clip, "grass")
        yield host.run("BasicGuider", model=model, conditioning=positive)[0]
        yield host.run("CFGGuider", model=model, positive=positive, negative=small.negative, cfg=4.0)[0]
        inputs = {
            "model": model,
            "cond2": other,
            "negative": small.negative,
            "cfg_conds": 4.0,
            "cfg_cond2_negative": 2.0,
        }
        yield host.run("DualCFGGuider", cond1=positive, style="regular", **inputs)[0]

    def draw(guider):
        (sigmas,) = host.run("BasicScheduler", model=small.model, scheduler="normal", steps=3, denoise=1.0)
        inputs = {"noise": noise, "sampler": euler(host), "sigmas": sigmas, "latent_image": empty()}
        return host.run("SamplerCustomAdvanced", guider=guider, **inputs)[0]["samples"]

    for ours, theirs in zip(guiders(small.model, edited), guiders(explicit, scene), strict=True):
        close(draw(ours), draw(theirs))


# Neutral, and what stays as it is.


def test_a_region_of_the_whole_picture_is_its_prompt_alone(host, small, prompts):
    """To the last bit, also beside a ControlNet and with its own words weighted."""
    scene, dog, cup = prompts
    for prompt in (dog, cup, reweight(host, dog, "snow:3")):
        for inputs in ({"boxes": "0 0 1 1"}, {"boxes": "", "mask_1": torch.ones(1, 5, 7)}):
            edited = regions(host, scene, prompt, feathers="0.2", **inputs)
            assert (sample(host, small, edited) - sample(host, small, prompt)).abs().max() == 0.0
    controlled, negative, model = under_controlnet(host, small, dog)
    expected = sample(host, small, controlled, model=model, negative=negative)
    controlled, negative, model = under_controlnet(host, small, regions(host, scene, dog, boxes="0, 0, 1, 1"))
    assert torch.equal(sample(host, small, controlled, model=model, negative=negative), expected)


@pytest.mark.parametrize(
    "inputs",
    [{"strengths": "0"}, {"base_share": 1.0}, {"end": 0.0}, {"mask_1": torch.zeros(1, 64, 64)}],
)
def test_regions_that_do_nothing_give_the_scene_back(host, prompts, inputs):
    scene, dog, _ = prompts
    assert regions(host, scene, dog, **inputs) is scene


def test_regions_of_no_size_and_outside_their_steps_change_nothing(host, small, prompts):
    scene, dog, cup = prompts
    expected = sample(host, small, scene)
    for edited in (
        regions(host, scene, dog, cup, boxes="0.5, 0.5, 0, 0.5\n1, 1, 1, 1"),
        regions(host, scene, dog, end=0.3),  # of three steps: none
    ):
        assert edited is not scene
        close(sample(host, small, edited), expected, 1e-5)


def test_more_regions_come_from_a_second_node(host, small, prompts):
    scene, dog, cup = prompts
    once = regions(host, scene, dog, cup, base_share=0.3)
    first = regions(host, scene, dog, base_share=0.3)
    twice = regions(host, first, cup, boxes="0.5, 0, 0.5, 1", base_share=0.3)
    assert torch.equal(sample(host, small, once), sample(host, small, twice))
    assert len(first[0][1]["blip_attention_edits"]) == 1


def test_the_wire_draws_the_same_picture(host, small, prompts):
    scene, dog, _ = prompts
    inputs = {"boxes": HALVES, "strengths": "1", "feathers": "0", "base_share": 0.0, "start": 0.0, "end": 1.0}
    conditioning, _, model = host.run(
        "BLIPDiffusionSubjectRegions", scene=scene, region_1=dog, model=small.model, **inputs
    )
    assert "hooks" not in conditioning[0][1]
    assert torch.equal(sample(host, small, conditioning, model=model), sample(host, small, regions(host, scene, dog)))
    with pytest.raises(ValueError, match="connect that node's model output to the sampler"):
        sample(host, small, conditioning)


# The layout.


def test_the_layout_shows_each_region_in_its_colour_with_its_subject(host, small, prompts):
    scene, dog, _ = prompts
    cup = stock(host, small.clip, "a cup")
    inputs = {"strengths": "1", "feathers": "0", "base_share": 0.0, "start": 0.0, "end": 1.0}
    boxes = "0, 0, 0.25, 1\n0.5, 0, 0.5, 0.5"
    _, sheet, _ = host.run(
        "BLIPDiffusionSubjectRegions", scene=scene, region_1=dog, region_2=cup, boxes=boxes, **inputs
    )
    assert sheet.shape == (1, 512, 512, 3)
    left, right, rest = sheet[0, 10, 10], sheet[0, 10, 400], sheet[0, 500, 400]
    assert not torch.equal(left, right)
    assert torch.equal(sheet[0, 500, 120], left)
    assert torch.equal(rest, torch.full((3,), 0.85))
    assert sheet[0, 240:272, :128].amin() < 0.2  # ink in the middle of the left region
    assert sheet[0, :100, :128].eq(left).all()
    mask = torch.zeros(2, 30, 50)
    mask[:, :, 25:] = 1
    _, sheet, _ = host.run("BLIPDiffusionSubjectRegions", scene=scene, region_1=dog, boxes="", mask_1=mask, **inputs)
    assert sheet.shape == (2, 30, 50, 3)


# Refusals.


def test_what_does_not_fit_is_refused(host, small, prompts):
    scene, dog, _ = prompts
    combined, _, _ = in_an_area(host, small, dog)
    (area,) = host.run("ConditioningSetArea", conditioning=dog, width=48, height=64, x=32, y=0, strength=1.0)
    wide = [[torch.zeros(1, 77, 2 * dog[0][0].shape[-1]), {}]]
    watched = host.run("BLIPDiffusionAttentionRecord", conditioning=dog)[0]
    both, _ = pair(host, small, scene, scene, texts=("a table in a garden",) * 2, self_end=0.5)
    controlled, _, _ = under_controlnet(host, small, dog)
    hooked, _, _ = under_lora(host, small, dog)
    for region, sentence in (
        (combined, "region_1 is combined of 2 conditionings and scene of 1"),
        (area, "region_1 has area, set_area_to_bounds, strength, which would be lost"),
        (controlled, "region_1 has control, control_apply_to_uncond, which would be lost"),
        (hooked, "region_1 has hooks, which would be lost"),
        (wide, f"region_1 is {wide[0][0].shape[-1]} numbers wide and scene {dog[0][0].shape[-1]}"),
        (watched, "region_1 comes from Record Attention: put that behind this node"),
        (both, "region_1 comes from Prompt-to-Prompt Edit and holds several prompts"),
        (regions(host, scene, dog), "region_1 has regions itself: connect it to scene"),
    ):
        with pytest.raises(ValueError, match=sentence):
            regions(host, scene, region)
    for other, sentence in (
        (both, "scene comes from Prompt-to-Prompt Edit"),
        (watched, "scene comes from Record Attention"),
    ):
        with pytest.raises(ValueError, match=sentence):
            regions(host, other, dog)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"boxes": "0, 0, 0.5"}, 'Line 1 of boxes is "0, 0, 0.5", but a box is four numbers'),
        ({"boxes": "\n0, 0, 2, 1"}, 'Line 2 of boxes is "0, 0, 2, 1"'),
        ({"boxes": "left"}, 'Line 1 of boxes is "left"'),
        ({"boxes": "\n0, 0, 1, 1"}, "region_1 has neither a mask nor a box: connect mask_1, or write .* in line 1"),
        ({"boxes": "0, 0, 1, 1"}, "region_2 has neither a mask nor a box"),
        ({"strengths": "1, x"}, 'strengths is "1, x", but it is one number for all regions or one for each of the 2'),
        ({"strengths": ""}, 'strengths is ""'),
        ({"feathers": "-1"}, 'feathers is "-1"'),
        ({"mask_1": torch.zeros(1, 2, 64, 64)}, "mask_1 is 1 x 2 x 64 x 64, but a mask is height x width"),
    ],
)
def test_what_is_written_wrong_is_named(host, prompts, inputs, sentence):
    scene, dog, cup = prompts
    with pytest.raises(ValueError, match=sentence):
        regions(host, scene, dog, cup, **inputs)


def test_another_model_is_refused_when_sampling_starts(host, small, prompts, monkeypatch):
    import comfy.supported_models

    edited = regions(host, prompts[0], prompts[1])
    config = comfy.supported_models.SDXL
    monkeypatch.setattr(small.model.model, "model_config", config.__new__(config))
    with pytest.raises(ValueError, match=r"This model is SDXL, but .* Subject Regions work on SD1.5's U-Net"):
        sample(host, small, edited)


def test_tiles_and_windows_that_part_regions_are_refused(host, small, prompts):
    """A tile would have got the masks of the whole picture, and the second window those of the first."""
    scene, dog, _ = prompts

    def in_tiles(function, arguments):
        tiles = arguments["input"].chunk(2, dim=-1)
        return torch.cat([function(tile, arguments["timestep"], **arguments["c"]) for tile in tiles], dim=-1)

    model = small.model.clone()
    model.set_model_unet_function_wrapper(in_tiles)
    with pytest.raises(ValueError, match="a tile of 6 x 8 of latents of 12 x 8, but the masks of Subject Regions"):
        sample(host, small, regions(host, scene, dog), model=model)

    windows, latent = in_windows(small.model, [0, 2], 2), empty(rows=4)
    masks = torch.zeros(4, 8, 12)
    masks[:2, :4], masks[2:, 4:] = 1, 1
    with pytest.raises(ValueError, match="called with 2 of the sampler's 4 pictures, but Subject Regions has a mask"):
        sample(host, small, regions(host, scene, dog, boxes="", mask_1=masks), latent, model=windows)
    edited = regions(host, scene, dog)
    whole = sample(host, small, edited, latent)
    assert sample(host, small, edited, latent, model=windows).shape == whole.shape


def test_runs_of_other_sizes_do_not_disturb_each_other(host, small, prompts):
    """As behind a second sampler with a larger latent."""
    edited = regions(host, prompts[0], prompts[1])
    first = sample_custom(host, small, small.model, edited, empty(), euler(host))["samples"]
    sample_custom(host, small, small.model, edited, empty(12, 20), euler(host))
    assert torch.equal(sample_custom(host, small, small.model, edited, empty(), euler(host))["samples"], first)
