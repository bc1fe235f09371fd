"""Regions with prompts of their own against a masked sum of whole attentions, in float32 within 1e-5."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_qformer.attention.alignment import Alignment
from blip_qformer.attention.edits import Box, EditedImage, PromptToPrompt, Region, Reweight
from blip_qformer.attention.plan import StepPlan, plan_step
from blip_qformer.attention.regions import (
    RegionAttention,
    attend_regions,
    box_mask,
    feather_mask,
    pixel_weights,
    region_weights,
    regions_mask,
)
from blip_qformer.attention.schedule import StepRange
from tests.attention.explicit import attended, fused, probabilities

CPU = torch.device("cpu")
CONTEXT = torch.zeros(1, 77, 8)
few = settings(max_examples=30, deadline=None)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def region(mask, **settings):
    return Region(CONTEXT, mask, **settings)


def at(mask, row, column):
    """The weights of each prompt in one pixel of the first image."""
    return mask[:, 0, row, column].tolist()


# Weights.


def test_a_box_covers_pixels_by_their_area():
    expected = torch.zeros(4, 8)
    expected[:2, 2:6] = 1
    assert torch.equal(box_mask(Box(0.25, 0, 0.5, 0.5), 4, 8)[0], expected)
    close(box_mask(Box(0.1, 0.25, 0.15, 0.75), 2, 10)[0, :, :4], torch.tensor([[0, 0.5, 0.25, 0], [0, 1, 0.5, 0]]))
    assert box_mask(Box(0, 0, 1, 1), 7, 5).eq(1).all()
    assert box_mask(Box(0.5, 0.5, 0.0, 0.2), 7, 5).eq(0).all()
    one_pixel = box_mask(Box(0.5, 0.5, 1 / 512, 1 / 512), 64, 64)
    close(one_pixel.sum(), torch.tensor(1 / 64))


def test_the_scene_has_what_regions_leave_and_overlaps_are_shared():
    left, right = region(Box(0, 0, 0.75, 1)), region(Box(0.5, 0, 0.25, 1), strength=3.0)
    weights = region_weights([left, right], 4, 4)
    assert at(weights, 0, 0) == [0, 1, 0]
    close(torch.tensor(at(weights, 0, 2)), torch.tensor([0, 0.25, 0.75]))
    assert at(weights, 0, 3) == [1, 0, 0]
    weights = region_weights([region(Box(0, 0, 0.5, 1), strength=0.5), region(Box(0, 0, 1, 1), base_share=0.2)], 4, 4)
    close(torch.tensor(at(weights, 1, 0)), torch.tensor([0.2 * 2 / 3, 1 / 3, 0.8 * 2 / 3]))
    close(torch.tensor(at(weights, 1, 3)), torch.tensor([0.2, 0, 0.8]))


@few
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_weights_add_up_to_one_at_every_size(count, images, height, width, seed):
    torch.manual_seed(seed)
    regions = []
    for _ in range(count):
        mask = (torch.rand(images, height + 3, width + 5) > torch.rand(1)).float()
        strength, feather, base_share = (torch.rand(3) * torch.tensor([2, 0.5, 1])).tolist()
        regions.append(region(mask, strength=strength, feather=feather, base_share=base_share))
    weights = region_weights(regions, height, width)
    assert weights.shape == (1 + count, images, height, width)
    assert weights.min() >= 0
    close(weights.sum(dim=0), torch.ones(images, height, width))
    size = ((height + 1) // 2, (width + 1) // 2)
    total = torch.zeros(images, size[0] * size[1])
    for each, pixels in pixel_weights(weights, size):
        total[:, slice(None) if pixels is None else pixels] += each
    close(total, torch.ones_like(total))


def test_masks_of_zeros_and_of_ones_are_exact():
    """So that nothing is computed for the scene, or for the region."""
    for size in ((1, 1), (7, 13), (100, 3)):
        full, none = region(torch.ones(1, *size), feather=0.4), region(torch.zeros(1, *size), feather=0.4)
        weights = region_weights([full, none], 12, 10)
        assert weights[1].eq(1).all()
        assert not weights[[0, 2]].any()
        assert [each.weights.shape[1] for each in pixel_weights(weights, (3, 3))] == [0, 9, 0]
    assert region_weights([none], 12, 10)[0].eq(1).all()


def test_a_soft_edge_is_as_wide_as_asked_and_half_of_it_is_inside():
    mask = torch.zeros(1, 20, 40)
    mask[..., :20] = 1
    soft = feather_mask(mask, 8)[0]
    assert torch.equal(soft, soft[:1].expand(20, 40))
    line = soft[0]
    assert line[:16].eq(1).all()
    assert line[24:].eq(0).all()
    assert (line.diff()[16:23] < 0).all()
    close(line[19] + line[20], torch.tensor(1.0))
    assert torch.equal(feather_mask(mask, 1.9), mask)


def test_the_mask_of_all_regions_is_their_sum_and_no_more_than_one():
    """Whatever their strengths: half of a pixel on each side is a whole one, and a batch repeats a single mask."""
    masks = torch.zeros(2, 3, 6)
    masks[0, :, :3], masks[1, 1] = 0.75, 0.5
    first, second = region(masks, strength=0.1), region(Box(0.25, 0, 0.75, 1), base_share=0.9)
    expected = torch.zeros(2, 3, 6)
    for image in range(2):
        for y in range(3):
            for x in range(6):
                covered = min(max(x + 1 - 1.5, 0), 1)  # of pixel x by the box, which begins at 1.5
                expected[image, y, x] = min(float(masks[image, y, x]) + covered, 1)
    close(regions_mask([first, second], 3, 6), expected)
    left, right = region(Box(0, 0, 0.5, 1), feather=0.4), region(Box(0.5, 0, 0.5, 1), feather=0.4)
    assert regions_mask([left, right], 20, 20).eq(1).all()  # no seam
    soft = regions_mask([left], 20, 20)
    assert soft[0, 0, :6].eq(1).all()
    assert soft[0, 0, 14:].eq(0).all()
    assert 0 < soft[0, 0, 10] < 1


def test_a_batch_of_masks_is_one_for_each_image():
    masks = torch.zeros(2, 4, 4)
    masks[0, :2], masks[1, 2:] = 1, 1
    weights = region_weights([region(masks), region(Box(0, 0, 1, 0.25))], 4, 4)
    assert weights[1, 0, 1].eq(1).all()
    assert not weights[1, 1, 1].any()
    assert weights[:, 1, 0, 0].tolist() == [0, 0, 1]


# Attention.


@st.composite
def layers(draw):
    """A query of a layer, and for each of some prompts keys, values and tokens; the first is the scene's."""
    heads, size = draw(st.integers(1, 3)), (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    lengths = draw(st.lists(st.sampled_from([77, 154, 81]), min_size=2, max_size=5))
    rows = draw(st.sampled_from([2, 4]))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    query = torch.randn(rows, size[0] * size[1], 4 * heads)
    prompts = [(torch.randn(rows, length, 4 * heads), torch.randn(rows, length, 4 * heads) / 2) for length in lengths]
    return query, prompts, heads, size


def random_regions(count, size):
    """Regions of random boxes, some of them empty or of one pixel."""
    boxes = [Box(*(torch.rand(4) * torch.tensor([0.7, 0.7, 1, 1])).tolist()) for _ in range(count)]
    boxes[0] = Box(0.4, 0.4, 1 / size[1], 1 / size[0])
    return [region(box, strength=0.2 + float(torch.rand(1)), base_share=0.3) for box in boxes]


def explicit(query, prompts, weights, heads, edit=lambda prompt, a: a):
    """The masked sum of whole attentions, of which each is built, edited and multiplied."""
    total = torch.zeros_like(query)
    for number, (key, values) in enumerate(prompts):
        a = edit(number, probabilities(query, key, heads))
        total += weights[number].flatten(1)[..., None] * attended(a, values, heads)
    return total


def closed(query, prompts, weights, heads, size, plans, group_size=1):
    found = pixel_weights(weights, size)
    attentions = [
        RegionAttention(*prompt, each, plan) for prompt, each, plan in zip(prompts, found, plans, strict=True)
    ]
    return attend_regions(query, attentions, group_size, partial(fused, heads=heads))


@few
@given(layers())
def test_regions_equal_a_masked_sum_of_attentions(layer):
    query, prompts, heads, size = layer
    weights = region_weights(random_regions(len(prompts) - 1, size), *size)
    before = query.clone()
    actual = closed(query, prompts, weights, heads, size, [StepPlan()] * len(prompts))
    close(actual, explicit(query, prompts, weights, heads))
    assert torch.equal(query, before)


def test_each_attention_is_computed_for_its_own_pixels_alone():
    """However many regions share an image, they are about one attention."""
    query, counts = torch.randn(1, 64, 8), []

    def attend(query, key, values):
        counts.append(query.shape[1])
        return fused(query, key, values, heads=2)

    for regions in (
        [Box(0, 0, 0.5, 1), Box(0.5, 0, 0.25, 1)],
        [Box(0, 0, 0.5, 0.5), Box(0.5, 0, 0.5, 1), Box(0, 0, 0, 0)],
    ):
        counts.clear()
        weights = pixel_weights(region_weights([region(box) for box in regions], 8, 8), (8, 8))
        prompts = [(torch.randn(1, 77, 8), torch.randn(1, 77, 8)) for _ in weights]
        attend_regions(
            query, [RegionAttention(*p, w, StepPlan()) for p, w in zip(prompts, weights, strict=True)], 1, attend
        )
        assert sum(counts) == 64
        assert 0 not in counts


def test_a_region_of_the_whole_image_is_its_prompt_alone():
    torch.manual_seed(0)
    query, key, values = torch.randn(2, 30, 8), torch.randn(2, 77, 8), torch.randn(2, 77, 8)
    weights = region_weights([region(torch.ones(1, 64, 64))], 5, 6)
    prompts = [(torch.randn(2, 77, 8), torch.randn(2, 77, 8)), (key, values)]
    actual = closed(query, prompts, weights, 2, (5, 6), [StepPlan()] * 2)
    assert (actual - fused(query, key, values, 2)).abs().max() == 0.0


@few
@given(layers(), st.integers(0, 9))
def test_a_word_of_a_region_is_weighted_in_its_region(layer, step):
    query, prompts, heads, size = layer
    lengths = [key.shape[1] for key, _ in prompts]
    factors = [torch.randn(length) for length in lengths]
    steps = [StepRange(0.2, 0.7), *[StepRange(0.0, 0.5)] * (len(prompts) - 1)]
    plain = random_regions(len(prompts) - 1, size)
    regions = [
        Region(torch.zeros(1, length, 8), each.mask, each.strength, edits=(Reweight(factor, when),))
        for each, length, factor, when in zip(plain, lengths[1:], factors[1:], steps[1:], strict=True)
    ]
    weights = region_weights(regions, *size)
    plan = plan_step([*regions, Reweight(factors[0], steps[0])], step, 10, CPU)
    plans = [plan, *(each.plan for each in plan.regions)]

    def edit(number, a):
        return a * factors[number] if steps[number].covers(step, 10) else a

    close(closed(query, prompts, weights, heads, size, plans), explicit(query, prompts, weights, heads, edit))


@few
@given(layers(), st.booleans(), st.integers(0, 9))
def test_one_region_follows_its_source_while_the_others_stay(layer, is_swap, step):
    """Groups of a source and its edit; the prompts of all other regions are the same for both."""
    query, prompts, heads, size = layer
    edited = len(prompts) - 1
    tokens = prompts[edited][0].shape[1]
    mapper = torch.zeros(tokens, tokens)
    mapper[torch.randint(tokens, (tokens,)), torch.arange(tokens)] = torch.rand(tokens)
    has_source = torch.ones(tokens, dtype=torch.bool) if is_swap else torch.rand(tokens) < 0.7
    image = EditedImage(Alignment(mapper * has_source, has_source), (StepRange(0, 0.8),) * tokens)
    weights = region_weights(random_regions(edited, size), *size)
    plans = [StepPlan()] * edited + [plan_step([PromptToPrompt((image,), StepRange(0, 0))], step, 10, CPU)]
    alpha = has_source.float() if step < 8 else torch.zeros(tokens)

    def edit(number, a):
        if number == edited:
            a[1::2] = a[::2] @ (mapper * has_source) * alpha + a[1::2] * (1 - alpha)
        return a

    actual = closed(query, prompts, weights, heads, size, plans, group_size=2)
    close(actual, explicit(query, prompts, weights, heads, edit))


def test_regions_apply_in_their_steps():
    early = Region(CONTEXT, Box(0, 0, 1, 1), steps=StepRange(0, 0.5))
    late = Region(CONTEXT, Box(0, 0, 1, 1), steps=StepRange(0.3, 1))
    active = [[each.region for each in plan_step([early, late], step, 10, CPU).regions] for step in (0, 4, 5)]
    assert active == [[early], [early, late], [late]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    query, key, values = (torch.randn(2, count, 8).to(dtype) for count in (12, 77, 77))
    weights = region_weights([region(Box(0, 0, 0.4, 0.4))], 3, 4)
    assert closed(query, [(key, values)] * 2, weights, 2, (3, 4), [StepPlan()] * 2).dtype == dtype
