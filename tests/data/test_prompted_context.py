"""A subject on another background: against pixels put there by hand."""

from __future__ import annotations

import random

import pytest
import torch

from blip_qformer.data.prompted_context import random_placement, random_window, subject_in_context
from blip_qformer.imaging.compositing import composite
from blip_qformer.imaging.masks import bounding_box


def square(height: int, width: int, rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[rows, columns] = 1
    return mask


def test_random_placements_keep_all_of_the_subject_inside_and_go_everywhere():
    alpha = square(60, 80, slice(3, 30), slice(50, 79))
    background, rng = torch.zeros(60, 80, 3), random.Random(0)
    boxes = []
    for _ in range(60):
        placement = random_placement(bounding_box(alpha), rng)
        _, image_alpha = composite(torch.ones(60, 80, 3), alpha, background, placement)
        left, top, right, bottom = bounding_box(image_alpha)
        boxes.append((left, top, right, bottom))
        height, width = (bottom - top) * 60, (right - left) * 80
        assert height / width == pytest.approx(27 / 29, rel=0.1)  # nothing of it is cut off
        assert 0.5 - 0.04 <= max(right - left, bottom - top) <= 0.95 + 0.04
    lefts, tops = [box[0] for box in boxes], [box[1] for box in boxes]
    assert min(lefts) < 0.05
    assert max(lefts) > 0.4
    assert min(tops) < 0.05
    assert max(tops) > 0.4


def test_a_subject_that_is_cut_off_stays_at_that_border():
    alpha = square(60, 80, slice(20, 60), slice(10, 50))
    rng, lefts = random.Random(0), []
    for _ in range(50):
        _, image_alpha = composite(
            torch.ones(60, 80, 3), alpha, torch.zeros(60, 80, 3), random_placement(bounding_box(alpha), rng)
        )
        left, top, right, bottom = bounding_box(image_alpha)
        assert bottom >= 1 - 1 / 60
        lefts.append(left)
    assert max(lefts) - min(lefts) > 0.3


def test_a_window_is_a_part_of_the_background():
    """Colours that are coordinates tell which window it is."""
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(300.0), indexing="ij")
    background = torch.stack([rows, columns, torch.zeros_like(rows)], dim=-1)
    rng = random.Random(0)
    heights, lefts = [], []
    for _ in range(100):
        window = random_window(background, 50, 80, rng)
        assert window.shape == (50, 80, 3)
        height, width = window[-1, 0, 0] - window[0, 0, 0], window[0, -1, 1] - window[0, 0, 1]
        assert height / width == pytest.approx(49 / 79, rel=0.05)
        heights.append(height.item())
        lefts.append(window[0, 0, 1].item())
    assert min(heights) >= 46
    assert max(heights) > 90
    assert min(lefts) < 20
    assert max(lefts) > 150


def test_a_subject_in_context():
    """The photograph's colours come out on the background, and the same rng gives the same image."""
    photograph = torch.tensor([0.9, 0.2, 0.1]).repeat(64, 80, 1)
    probability = square(64, 80, slice(16, 48), slice(20, 60))
    photograph[probability == 0] = torch.tensor([0.1, 0.3, 0.9])
    background = torch.tensor([0.2, 0.8, 0.2]).repeat(50, 50, 1)
    image, image_alpha, alpha = subject_in_context(photograph, probability, background, random.Random(1))
    assert torch.equal(alpha, probability)
    assert image.shape == photograph.shape
    torch.testing.assert_close(image[image_alpha == 1], photograph[16:17, 20].expand((image_alpha == 1).sum(), 3))
    assert torch.equal(image[image_alpha == 0], background[:1, 0].expand((image_alpha == 0).sum(), 3))
    again, _, _ = subject_in_context(photograph, probability, background, random.Random(1))
    other, _, _ = subject_in_context(photograph, probability, background, random.Random(2))
    assert torch.equal(again, image)
    assert not torch.equal(other, image)
