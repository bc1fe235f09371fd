"""A subject over another background: against pixels put there by hand."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.imaging.compositing import Placement, composite


def random_images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*size, 3, generator=generator) for size in sizes]


def square(height: int, width: int, rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[rows, columns] = 1
    return mask


def test_in_its_place_nothing_is_resampled():
    photograph, background = random_images((20, 30), (20, 30))
    alpha = square(20, 30, slice(3, 9), slice(4, 20))
    image, placed = composite(photograph, alpha, background, Placement())
    assert torch.equal(placed, alpha)
    assert torch.equal(image, torch.where(alpha[..., None] == 1, photograph, background))


def test_half_transparent_is_half_of_both():
    photograph, background = random_images((8, 8), (8, 8))
    image, _ = composite(photograph, torch.full((8, 8), 0.25), background, Placement())
    torch.testing.assert_close(image, 0.25 * photograph + 0.75 * background)


@pytest.mark.parametrize(("x", "y", "moved"), [(0.1, 0.0, (0, 3)), (0.0, -0.25, (-5, 0)), (0.5, 0.5, (10, 15))])
def test_a_shift_moves_by_parts_of_the_new_picture(x, y, moved):
    photograph, background = random_images((20, 30), (20, 30))
    image, placed = composite(photograph, torch.ones(20, 30), background, Placement(x=x, y=y))
    expected = background.clone()
    for row in range(20):
        for column in range(30):
            if 0 <= row - moved[0] < 20 and 0 <= column - moved[1] < 30:
                expected[row, column] = photograph[row - moved[0], column - moved[1]]
    assert torch.equal(image, expected)
    assert placed.sum() == (20 - abs(moved[0])) * (30 - abs(moved[1]))


def test_a_subject_that_lies_outside_leaves_the_background():
    photograph, background = random_images((20, 30), (20, 30))
    for placement in (Placement(x=2), Placement(x=-2), Placement(y=1.5), Placement(0.5, y=-9), Placement(scale=1e-9)):
        image, placed = composite(photograph, torch.zeros(20, 30), background, placement)
        assert torch.equal(image, background)
    image, placed = composite(photograph, torch.ones(20, 30), background, Placement(x=2))
    assert torch.equal(image, background)
    assert not placed.any()


def test_scaling_is_about_the_middle_and_fits_inside():
    (background,) = random_images((40, 120))
    white = torch.ones(20, 30, 3)
    _, placed = composite(white, torch.ones(20, 30), background, Placement())
    assert torch.equal(placed, square(40, 120, slice(0, 40), slice(30, 90)))
    _, placed = composite(white, torch.ones(20, 30), background, Placement(scale=0.5))
    assert torch.equal(placed, square(40, 120, slice(10, 30), slice(45, 75)))
    _, placed = composite(white, torch.ones(20, 30), background, Placement(scale=3))
    assert torch.equal(placed, square(40, 120, slice(0, 40), slice(0, 120)))


def test_what_is_transparent_does_not_bleed_into_the_edge():
    """White on black, made smaller: the grey between is not the subject's colour."""
    alpha = square(40, 40, slice(7, 29), slice(5, 33))
    photograph = alpha[..., None].expand(-1, -1, 3)
    image, _ = composite(photograph, alpha, torch.ones(17, 17, 3), Placement())
    torch.testing.assert_close(image, torch.ones(17, 17, 3))
