"""Soft edges and boxes of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from blip_qformer.imaging.masks import NoSubjectError, blur_mask, bounding_box


def test_softening_is_a_gaussian_blur():
    mask = (torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    expected = gaussian_filter(mask.numpy(), 2.5, mode="nearest", truncate=3.2)
    assert np.abs(blur_mask(mask, 2.5).numpy() - expected).max() < 1e-5
    assert blur_mask(mask, 0) is mask
    assert blur_mask(torch.ones(3, 3), 20).allclose(torch.ones(3, 3))


def square(height: int, width: int, rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[rows, columns] = 1
    return mask


def test_bounding_boxes():
    assert bounding_box(square(10, 20, slice(2, 5), slice(4, 20))) == (0.2, 0.2, 1.0, 0.5)
    with pytest.raises(NoSubjectError, match="Nothing in the picture is opaque"):
        bounding_box(torch.full((5, 5), 0.05))
