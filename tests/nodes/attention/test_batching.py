"""A source and its edits as one batch: rows, noise and masks of several images, and conditionings that do not fit."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.graphs import (
    LONG,
    SOURCE,
    SWAPPED,
    close,
    euler,
    inserted,
    pair,
    reweight,
    sample,
    sample_custom,
    side_by_side,
    under_controlnet,
)
from tests.nodes.test_prompt import stock


def test_several_edits_of_several_images_are_those_of_each_alone(host, small):
    """[source, edit, edit_2] of image 5 and of image 2."""
    source, edited = inserted(host, small)
    swapped = stock(host, small.clip, SWAPPED)
    inputs = {"texts": (SOURCE, f"\n{SWAPPED}"), "weights": "cat:2", "blend_words": "<subject>, cat"}
    latent = {"samples": torch.rand(2, 4, 8, 12), "batch_index": [5, 2], "noise_mask": torch.ones(2, 1, 64, 96)}
    conditioning, together = pair(host, small, source, edited, latent, edited_2=swapped, **inputs)
    assert together["batch_index"] == [5, 5, 5, 2, 2, 2]
    sampled = sample_custom(
        host, small, small.model, conditioning, together, host.run("KSamplerSelect", sampler_name="euler")[0]
    )
    (masks,) = host.run("BLIPDiffusionEditMask", latent=sampled)
    assert masks.shape == (4, 64, 96)
    for image in range(2):
        alone = {name: value[image : image + 1] for name, value in latent.items()}
        for number, (other, text, words) in enumerate([(edited, "", "<subject>"), (swapped, SWAPPED, "cat")], start=1):
            settings = {"texts": (SOURCE, text), "blend_words": words, "weights": "cat:2" if number == 2 else ""}
            conditioning, one = pair(host, small, source, other, alone, **settings)
            expected = sample_custom(host, small, small.model, conditioning, one, euler(host))
            close(sampled["samples"][[3 * image, 3 * image + number]], expected["samples"])
            (mask,) = host.run("BLIPDiffusionEditMask", latent=expected)
            assert torch.equal(masks[2 * image + number - 1], mask[0])


def test_weights_of_a_prompt_stay_with_its_image(host, small):
    """Attention Re-weight Edit before this node is what the node's own weights are."""
    source, edited = inserted(host, small)
    inputs = {"texts": (SOURCE, "")}
    before = pair(host, small, source, reweight(host, edited, "snow:3"), **inputs)
    own = pair(host, small, source, edited, weights="snow:3", **inputs)
    sampled = sample(host, small, *before)
    close(sampled, sample(host, small, *own), 1e-6)
    louder = reweight(host, source, "dog:3", clip=small.clip, text=SOURCE)
    sampled = sample(host, small, *pair(host, small, louder, edited, cross_end=0.0, self_end=0.0, **inputs))
    close(sampled[:1], sample(host, small, louder), 1e-4)
    close(sampled[1:], sample(host, small, edited), 1e-4)


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
        assert not same(within(one), within(other))
        assert not same(within(other), within(one))
    assert not same({"a": one}, {"b": one})


def test_a_batch_that_cannot_be_paired_is_refused(host, small):
    source, edited = inserted(host, small)
    conditioning, latent = pair(host, small, source, edited, texts=(SOURCE, ""))
    with pytest.raises(ValueError, match=r"The sampler draws 1 picture\(s\), but .* needs 2 side by side"):
        sample(host, small, conditioning)
    (longer,) = host.run("ConditioningConcat", conditioning_to=conditioning, conditioning_from=conditioning)
    with pytest.raises(ValueError, match="had 2 rows of 77 tokens and now has 2 of 154"):
        sample(host, small, longer, latent)
    three, _ = pair(host, small, source, edited, edited_2=edited, texts=(SOURCE, ""))
    (both,) = host.run("ConditioningCombine", conditioning_1=conditioning, conditioning_2=three)
    with pytest.raises(ValueError, match="Prompt-to-Prompt Edits of 2 and 3 pictures are combined"):
        sample(host, small, both, side_by_side(6))


def test_a_watched_prompt_is_refused_with_what_to_do(host, small):
    source, edited = inserted(host, small)
    watched, *_ = host.run("BLIPDiffusionAttentionRecord", conditioning=edited, clip=small.clip, text=SOURCE)
    with pytest.raises(ValueError, match="comes from Record Attention: put that behind this node"):
        pair(host, small, source, watched, texts=(SOURCE, ""))
