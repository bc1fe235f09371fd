"""Losses and masks of stage 1 against loops written out, and how hard negatives are sampled."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from blip_qformer.training.losses import (
    contrastive_loss,
    contrastive_mask,
    generation_loss,
    generation_mask,
    hard_negatives,
    matching_mask,
    query_text_similarity,
)

QUERIES = 2
ATTENTION = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])  # three tokens and one of padding; two and two

# Who (row) attends to whom (column): two queries, then four tokens of which the last is padding.
CONTRAST = """
    xx....
    xx....
    ..xxx.
    ..xxx.
    ..xxx.
    ..xxx.
"""
MATCHING = """
    xxxxx.
    xxxxx.
    xxxxx.
    xxxxx.
    xxxxx.
    xxxxx.
"""
GENERATION = """
    xx....
    xx....
    xxx...
    xxxx..
    xxxxx.
    xxxxx.
"""


@pytest.mark.parametrize(
    ("make", "rows"), [(contrastive_mask, CONTRAST), (matching_mask, MATCHING), (generation_mask, GENERATION)]
)
def test_each_mask_cell_by_cell(make, rows):
    mask = make(ATTENTION, QUERIES)
    expected = torch.tensor([[cell == "x" for cell in row] for row in rows.split()])
    assert torch.equal(mask[0], expected)
    expected[:, QUERIES + 2] = False  # the second text is shorter by one
    assert torch.equal(mask[1], expected)
    assert mask.any(dim=-1).all()  # a row without any would be NaN


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def cross_entropy(scores: list[float], target: int, smoothing: float) -> float:
    """Of one row, from the definition: the label is 1 - smoothing, and smoothing is shared out among all."""
    largest = max(scores)
    total = math.log(sum(math.exp(score - largest) for score in scores)) + largest
    labels = [smoothing / len(scores) + (1 - smoothing) * (index == target) for index in range(len(scores))]
    return sum(label * (total - score) for label, score in zip(labels, scores, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("first", [0, 3])
def test_contrast_against_a_loop(first, smoothing):
    """Three images of six processes' texts, each with its best query."""
    torch.manual_seed(0)
    images, texts, temperature = unit(6, QUERIES, 8), unit(6, 8), 0.2
    own = range(first, first + 3)
    image_to_text = query_text_similarity(images[own], texts)
    text_to_image = query_text_similarity(images, texts[own]).T
    found = contrastive_loss(image_to_text, text_to_image, first, torch.tensor(temperature), smoothing)

    def similarity(image: int, text: int) -> float:
        return max(float(query @ texts[text]) for query in images[image]) / temperature

    losses = []
    for index in own:
        losses.append(cross_entropy([similarity(index, other) for other in range(6)], index, smoothing))
        losses.append(cross_entropy([similarity(other, index) for other in range(6)], index, smoothing))
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_generation_against_a_loop(smoothing):
    torch.manual_seed(0)
    vocabulary, length = 7, ATTENTION.shape[1]
    logits, ids = torch.randn(2, length, vocabulary), torch.randint(vocabulary, (2, length))
    losses = [
        cross_entropy(logits[row, position].tolist(), int(ids[row, position + 1]), smoothing)
        for row in range(2)
        for position in range(length - 1)
        if ATTENTION[row, position + 1]
    ]
    assert len(losses) == 3
    found = generation_loss(logits, ids, ATTENTION, smoothing)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def sample(similarity: torch.Tensor, first: int, temperature: float, count: int) -> torch.Tensor:
    """[count, B]: sampled with a seed each time another."""
    return torch.stack(
        [
            hard_negatives(
                similarity,
                first,
                torch.tensor(temperature),
                [torch.Generator().manual_seed(1000 * number + row) for row in range(len(similarity))],
            )
            for number in range(count)
        ]
    )


def test_hard_negatives_are_never_the_own_partner():
    similarity = torch.eye(3, 6).roll(2, dims=1)  # the own partner is by far the most similar
    sampled = sample(similarity, 2, 0.05, 300)
    assert not (sampled == torch.tensor([2, 3, 4])).any()


def test_hard_negatives_follow_the_similarity():
    """Sampled as often as the softmax of the others says, and one (seed, row) the same each time."""
    similarity, temperature, count = torch.tensor([[0.9, 0.5, 0.3, -0.2]]), 0.3, 4000
    sampled = sample(similarity, 0, temperature, count)
    weights = [math.exp(value / temperature) for value in (0.5, 0.3, -0.2)]
    total = math.exp(0.9 / temperature) + sum(weights)
    shares = [weight / total + 1e-4 for weight in weights]
    found = Counter(sampled[:, 0].tolist())
    for column, share in enumerate(shares, start=1):
        expected = share / sum(shares)
        assert found[column] / count == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))
    assert torch.equal(sample(similarity, 0, temperature, 10), sampled[:10])


def test_a_pair_alone_has_no_negative():
    with pytest.raises(ValueError, match="one pair has none: set batch_size to 2 or more"):
        hard_negatives(torch.ones(1, 1), 0, torch.tensor(0.1), [torch.Generator()])
