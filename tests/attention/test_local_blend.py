"""Local blend against explicit probabilities and the published code's steps."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_qformer.attention.alignment import Alignment
from blip_qformer.attention.edits import EditedImage
from blip_qformer.attention.local_blend import (
    blend_latents,
    blend_mask,
    blend_predictions,
    edited_word_maps,
    word_maps,
)
from blip_qformer.attention.plan import cross_replace_alpha, plan_blend, plan_cross
from blip_qformer.attention.schedule import StepRange
from tests.attention.explicit import probabilities

few = settings(max_examples=20, deadline=None)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@few
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.sampled_from([77, 154]), st.integers(0, 9999))
def test_maps_are_sums_of_the_words_columns(batch, heads, queries, tokens, seed):
    torch.manual_seed(seed)
    query, key = torch.randn(batch, queries, heads * 4), torch.randn(batch, tokens, heads * 4)
    a = probabilities(query, key, heads).mean(dim=1)
    columns = torch.zeros(tokens, 2)
    columns[[3, 5, 7], 0] = columns[[1], 1] = 1
    expected = torch.stack([a[..., [3, 5, 7]].sum(-1), a[..., 1]], dim=1)
    close(word_maps(query, key, columns, heads), expected)


@few
@given(st.booleans(), st.booleans(), st.integers(0, 4), st.integers(0, 9999))
def test_maps_are_those_of_the_edited_attention(has_source_words, has_edited_words, step, seed):
    """Of the source's words in A_source, and of the edit's in the A that the edit is sampled with."""
    torch.manual_seed(seed)
    tokens, heads = 77, 2
    source_query, query = torch.randn(2, 1, 12, 8)
    source_key, key = torch.randn(2, 1, tokens, 8)
    mapper, has_source = torch.rand(tokens, tokens), torch.rand(tokens) < 0.7
    words = [(torch.rand(tokens) < 0.1).float() if given else None for given in (has_source_words, has_edited_words)]
    steps = tuple(StepRange(0, 0.8 if position % 2 else 0.3) for position in range(tokens))
    image = EditedImage(Alignment(mapper * has_source, has_source), steps, *words)
    if not image.has_local_blend:
        return
    a_source = probabilities(source_query, source_key, heads)
    a = probabilities(query, key, heads)
    alpha = cross_replace_alpha(image, step, 5)
    a = (a_source @ image.alignment.mapper) * alpha + a * (1 - alpha)
    expected = [(each @ word).mean(dim=1) for each, word in zip((a_source, a), words, strict=True) if word is not None]

    plan = plan_blend(image, plan_cross(image.alignment, alpha))
    maps = edited_word_maps((source_query, source_key), (query, key), plan.source_columns, plan.edited_columns, heads)
    close(maps, torch.stack(expected, dim=1))


@few
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(2, 5),
    st.floats(0.05, 0.95),
    st.integers(0, 999),
)
def test_the_mask(batch, count, rows, columns, threshold, seed):
    """3 x 3 maximum, resized by the nearest, over its maximum, thresholded; the union of all words'."""
    torch.manual_seed(seed)
    maps = [torch.rand(batch, rows, columns) for _ in range(count)]
    size = (rows * 4 - 3, columns * 4)
    expected = torch.zeros(batch, *size, dtype=torch.bool)
    for each in maps:
        for b in range(batch):
            for y in range(size[0]):
                for x in range(size[1]):
                    cy, cx = y * rows // size[0], x * columns // size[1]
                    near = each[b, max(cy - 1, 0) : cy + 2, max(cx - 1, 0) : cx + 2].max()
                    expected[b, y, x] |= near / each[b].max() > threshold
    assert torch.equal(blend_mask(maps, size, threshold), expected)


def test_a_word_that_is_looked_at_nowhere_leaves_the_source():
    assert not blend_mask([torch.zeros(1, 4, 4)], (16, 16), 0.3).any()


def test_blending():
    source, edited = torch.randn(2, 2, 4, 6, 5)
    mask = torch.rand(2, 6, 5) < 0.5
    blended = blend_latents(source, edited, mask)
    close(blended, source + mask[:, None].float() * (edited - source))
    outside = ~mask[:, None].expand_as(source)
    assert torch.equal(blended[outside], source[outside])


@few
@given(st.integers(0, 9999))
def test_a_soft_mask_mixes_predictions_and_keeps_latents_where_it_is_zero(seed):
    torch.manual_seed(seed)
    source, edited = torch.randn(2, 2, 4, 6, 5)
    mask = torch.rand(2, 6, 5).mul(3).sub(1).clamp(0, 1)  # a third zeros, a third ones
    mixed, kept = blend_predictions(source, edited, mask), blend_latents(source, edited, mask)
    close(mixed, source * (1 - mask[:, None]) + edited * mask[:, None])
    outside, inside = (where[:, None].expand_as(source) for where in (mask == 0, mask == 1))
    assert torch.equal(mixed[outside], source[outside])
    assert torch.equal(mixed[inside], edited[inside])
    assert torch.equal(kept[outside], source[outside])
    assert torch.equal(kept[~outside], edited[~outside])
