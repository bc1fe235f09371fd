"""A subject on another background: against pixels put there by hand."""

from __future__ import annotations

import random

import pytest
import torch

from blip_qformer.data.prompted_context import random_placement, random_window, subject_in_context
from blip_qformer.imaging.compositing import Placement, cover, extent_of, place
from blip_qformer.imaging.matting import NoSubjectError


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*size, 3, generator=generator) for size in sizes]


def square(height: int, width: int, rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[rows, columns] = 1
    return mask


def test_in_its_place_nothing_is_resampled():
    photograph, background = pictures((20, 30), (20, 30))
    alpha = square(20, 30, slice(3, 9), slice(4, 20))
    picture, placed = place(photograph, alpha, background, Placement())
    assert torch.equal(placed, alpha)
    assert torch.equal(picture, torch.where(alpha[..., None] == 1, photograph, background))


def test_half_transparent_is_half_of_both():
    photograph, background = pictures((8, 8), (8, 8))
    picture, _ = place(photograph, torch.full((8, 8), 0.25), background, Placement())
    torch.testing.assert_close(picture, 0.25 * photograph + 0.75 * background)


@pytest.mark.parametrize(("x", "y", "moved"), [(0.1, 0.0, (0, 3)), (0.0, -0.25, (-5, 0)), (0.5, 0.5, (10, 15))])
def test_a_shift_moves_by_parts_of_the_new_picture(x, y, moved):
    photograph, background = pictures((20, 30), (20, 30))
    picture, placed = place(photograph, torch.ones(20, 30), background, Placement(x=x, y=y))
    expected = background.clone()
    for row in range(20):
        for column in range(30):
            if 0 <= row - moved[0] < 20 and 0 <= column - moved[1] < 30:
                expected[row, column] = photograph[row - moved[0], column - moved[1]]
    assert torch.equal(picture, expected)
    assert placed.sum() == (20 - abs(moved[0])) * (30 - abs(moved[1]))


def test_a_subject_that_lies_outside_leaves_the_background():
    photograph, background = pictures((20, 30), (20, 30))
    for placement in (Placement(x=2), Placement(x=-2), Placement(y=1.5), Placement(0.5, y=-9), Placement(scale=1e-9)):
        picture, placed = place(photograph, torch.zeros(20, 30), background, placement)
        assert torch.equal(picture, background)
    picture, placed = place(photograph, torch.ones(20, 30), background, Placement(x=2))
    assert torch.equal(picture, background)
    assert not placed.any()


def test_scaling_is_about_the_middle_and_fits_inside():
    (background,) = pictures((40, 120))
    white = torch.ones(20, 30, 3)
    _, placed = place(white, torch.ones(20, 30), background, Placement())
    assert torch.equal(placed, square(40, 120, slice(0, 40), slice(30, 90)))
    _, placed = place(white, torch.ones(20, 30), background, Placement(scale=0.5))
    assert torch.equal(placed, square(40, 120, slice(10, 30), slice(45, 75)))
    _, placed = place(white, torch.ones(20, 30), background, Placement(scale=3))
    assert torch.equal(placed, square(40, 120, slice(0, 40), slice(0, 120)))


def test_what_is_transparent_does_not_bleed_into_the_edge():
    """White on black, made smaller: the grey between is not the subject's colour."""
    alpha = square(40, 40, slice(7, 29), slice(5, 33))
    photograph = alpha[..., None].expand(-1, -1, 3)
    picture, _ = place(photograph, alpha, torch.ones(17, 17, 3), Placement())
    torch.testing.assert_close(picture, torch.ones(17, 17, 3))


def test_extents():
    assert extent_of(square(10, 20, slice(2, 5), slice(4, 20))) == (0.2, 0.2, 1.0, 0.5)
    with pytest.raises(NoSubjectError, match="Nothing in the picture is opaque"):
        extent_of(torch.full((5, 5), 0.05))


def test_random_placements_keep_all_of_the_subject_inside_and_go_everywhere():
    alpha = square(60, 80, slice(3, 30), slice(50, 79))
    background, order = torch.zeros(60, 80, 3), random.Random(0)
    boxes = []
    for _ in range(60):
        placement = random_placement(extent_of(alpha), order)
        _, placed = place(torch.ones(60, 80, 3), alpha, background, placement)
        left, top, right, bottom = extent_of(placed)
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
    order, lefts = random.Random(0), []
    for _ in range(50):
        _, placed = place(
            torch.ones(60, 80, 3), alpha, torch.zeros(60, 80, 3), random_placement(extent_of(alpha), order)
        )
        left, top, right, bottom = extent_of(placed)
        assert bottom >= 1 - 1 / 60
        lefts.append(left)
    assert max(lefts) - min(lefts) > 0.3


def test_a_window_is_a_part_of_the_background():
    """Colours that are the place tell which part it is."""
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(300.0), indexing="ij")
    background = torch.stack([rows, columns, torch.zeros_like(rows)], dim=-1)
    order = random.Random(0)
    heights, lefts = [], []
    for _ in range(100):
        window = random_window(background, 50, 80, order)
        assert window.shape == (50, 80, 3)
        height, width = window[-1, 0, 0] - window[0, 0, 0], window[0, -1, 1] - window[0, 0, 1]
        assert height / width == pytest.approx(49 / 79, rel=0.05)
        heights.append(height.item())
        lefts.append(window[0, 0, 1].item())
    assert min(heights) >= 46
    assert max(heights) > 90
    assert min(lefts) < 20
    assert max(lefts) > 150
    middle = cover(background, 100, 100)
    assert torch.equal(middle, background[:, 100:200])


def test_a_subject_in_context():
    """The photograph's colours come out on the background, and the same order gives the same picture."""
    photograph = torch.tensor([0.9, 0.2, 0.1]).repeat(64, 80, 1)
    probability = square(64, 80, slice(16, 48), slice(20, 60))
    photograph[probability == 0] = torch.tensor([0.1, 0.3, 0.9])
    background = torch.tensor([0.2, 0.8, 0.2]).repeat(50, 50, 1)
    picture, placed, alpha = subject_in_context(photograph, probability, background, random.Random(1))
    assert torch.equal(alpha, probability)
    assert picture.shape == photograph.shape
    torch.testing.assert_close(picture[placed == 1], photograph[16:17, 20].expand((placed == 1).sum(), 3))
    assert torch.equal(picture[placed == 0], background[:1, 0].expand((placed == 0).sum(), 3))
    again, _, _ = subject_in_context(photograph, probability, background, random.Random(1))
    other, _, _ = subject_in_context(photograph, probability, background, random.Random(2))
    assert torch.equal(again, picture)
    assert not torch.equal(other, picture)
