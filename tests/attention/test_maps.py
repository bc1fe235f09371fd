"""Maps of attention against the formula, and how they become images."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.attention.maps import Area, AttentionRecord, mean_attention, overlay_heatmap, to_heatmap
from blip_qformer.prompt import TokenSpan

PROMPT = [TokenSpan("a", (1,)), TokenSpan("<subject>", (2, 3)), TokenSpan("dog", (4,)), TokenSpan(",", (5,))]
REPEATED = [*PROMPT, TokenSpan("dog", (6,))]
TOKENS = 8


def explicit(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention as it is written down, [B, heads, queries, keys]."""
    (rows, queries, width), keys = query.shape, key.shape[1]
    q = query.reshape(rows, queries, heads, width // heads)
    k = key.reshape(rows, keys, heads, width // heads)
    scores = torch.einsum("bphd,bkhd->bhpk", q, k) / (width // heads) ** 0.5
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("rows", "queries", "tokens", "heads", "width"), [(1, 1, 1, 1, 4), (3, 20, 77, 8, 64), (2, 7, 154, 2, 10)]
)
def test_it_is_the_mean_over_the_heads(rows, queries, tokens, heads, width):
    query, key = torch.randn(rows, queries, width), torch.randn(rows, tokens, width)
    maps = mean_attention(query, key, heads, tokens)
    torch.testing.assert_close(maps, explicit(query, key, heads).mean(1).mT, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps.sum(1), torch.ones(rows, queries))


@pytest.mark.parametrize("times", [2, 3])
def test_a_prompt_that_the_host_repeats_is_counted_once(times):
    query, key = torch.randn(2, 5, 12), torch.randn(2, 11, 12)
    once = mean_attention(query, key, heads=3, tokens=11)
    torch.testing.assert_close(mean_attention(query, key.repeat(1, times, 1), heads=3, tokens=11), once)


def test_half_precision_is_reckoned_in_full():
    query, key = torch.randn(1, 9, 8).half(), torch.randn(1, 5, 8).half()
    expected = explicit(query.float(), key.float(), 2).mean(1).mT
    torch.testing.assert_close(mean_attention(query, key, 2, 5), expected, atol=1e-6, rtol=0)


def recorded(*maps: torch.Tensor, spans=REPEATED, size=(4, 4)) -> AttentionRecord:
    record = AttentionRecord([spans])
    record.start(*size)
    for each in maps:
        record.add(0, each)
    record.finish()
    return record


def test_layers_and_steps_of_all_sizes_count_the_same():
    fine, coarse = torch.rand(2, TOKENS, 4, 4), torch.rand(2, TOKENS, 1, 1)
    record = recorded(fine, fine, coarse)
    expected = (2 * fine[:, 4] + 2 * fine[:, 6] + coarse[:, 4] + coarse[:, 6]) / 3  # dog stands there twice
    torch.testing.assert_close(record.word_map("dog", 4, 4), expected)
    torch.testing.assert_close(record.word_map("dog#2", 4, 4), (2 * fine[:, 6] + coarse[:, 6]) / 3)


def test_the_subjects_vectors_and_phrases_are_summed():
    maps = torch.rand(1, TOKENS, 4, 4)
    record = recorded(maps)
    torch.testing.assert_close(record.word_map("<subject>", 4, 4), maps[:, 2] + maps[:, 3])
    torch.testing.assert_close(record.word_map("a <subject>", 4, 4), maps[:, 1:4].sum(1))


@pytest.mark.parametrize("size", [(32, 32), (30, 50), (1, 3)])
def test_a_map_has_the_pictures_size_and_keeps_its_mean(size):
    maps = torch.full((1, TOKENS, 2, 3), 0.25)
    torch.testing.assert_close(recorded(maps).word_map("a", *size), torch.full((1, *size), 0.25))


def test_an_area_is_put_where_it_belongs():
    record = AttentionRecord([PROMPT, REPEATED])
    record.start(8, 12)
    left, right = torch.full((1, TOKENS, 4, 3), 0.5), torch.full((1, TOKENS, 4, 3), 0.1)
    record.add(0, left, Area(height=8, width=6, top=0, left=0))
    record.add(1, right, Area(height=4, width=99, top=4, left=4))  # hangs over the right edge
    expected = torch.zeros(1, 16, 24)
    expected[:, :, :12] = 0.5
    expected[:, 8:, 8:] = 0.2
    expected[:, 8:, 8:12] = (0.5 + 0.2) / 2  # where both attend, their mean; "dog" is one token here and two there
    torch.testing.assert_close(record.word_map("dog", 16, 24), expected)


def test_a_word_that_only_one_prompt_has():
    record = AttentionRecord([PROMPT, [TokenSpan("hat", (1,))]])
    record.start(2, 2)
    maps = torch.rand(1, TOKENS, 2, 2)
    record.add(0, torch.rand(1, TOKENS, 2, 2))
    record.add(1, maps)
    torch.testing.assert_close(record.word_map("hat", 2, 2), maps[:, 1])
    assert record.words() == ["a", "<subject>", "dog", "hat"]


def test_a_word_that_is_not_there_is_named():
    with pytest.raises(ValueError, match='There is no "cat" in this prompt; its words are: a, <subject>, dog.'):
        recorded(torch.rand(1, TOKENS, 4, 4)).word_map("cat", 4, 4)


def test_a_run_starts_afresh():
    record = recorded(torch.rand(3, TOKENS, 4, 4))
    assert record.batch_size == 3
    record.start(2, 2)
    assert record.batch_size == 0
    maps = torch.rand(1, TOKENS, 2, 2)
    record.add(0, maps)
    torch.testing.assert_close(record.word_map("a", 2, 2), maps[:, 1])


def test_what_is_added_is_left_alone():
    maps = torch.rand(1, TOKENS, 2, 2)
    before = maps.clone()
    recorded(maps, maps, size=(2, 2))
    assert torch.equal(maps, before)


def test_heatmaps_go_from_0_to_1_in_every_image():
    maps = torch.rand(3, 5, 6) * torch.tensor([1, 0.01, 0]).view(3, 1, 1)
    heatmaps = to_heatmap(maps)
    assert heatmaps.amin((1, 2)).tolist() == [0, 0, 0]
    assert heatmaps.amax((1, 2)).tolist() == [1, 1, 0]
    assert torch.equal(heatmaps[1].flatten().argsort(), maps[1].flatten().argsort())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_overlay_of_strength_0_is_the_image(channels):
    images = torch.rand(2, 3, 4, channels)
    images[..., 3:] = 1
    assert torch.equal(overlay_heatmap(images, torch.rand(2, 3, 4), 0.0), images[..., :3].expand(-1, -1, -1, 3))


def test_an_overlay_glows_where_the_heat_is():
    glow = overlay_heatmap(torch.full((1, 1, 4, 3), 0.5), torch.tensor([[[0, 1 / 3, 2 / 3, 1]]]), 1.0)
    torch.testing.assert_close(glow[0, 0], torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]))
