"""Cutting out against a known alpha, degenerate trimaps, and what is asked of larger pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from blip_qformer.imaging.matting import NoSubjectError, matte, resized, soften, trimap_of


def composite(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A disc with a soft edge of a tenth of the picture, on another smooth texture: picture, alpha, foreground."""
    y, x = np.mgrid[:height, :width]
    y, x = y / height, x / width
    alpha = np.clip((0.35 - np.hypot(y - 0.5, x - 0.5)) / 0.1 + 0.5, 0, 1)
    foreground = np.stack([0.8 + 0.15 * np.sin(9 * x), 0.3 + 0.1 * y, 0.1 + 0.05 * x], axis=-1)
    background = np.stack([0.1 + 0.1 * y, 0.4 + 0.1 * np.sin(7 * y), 0.8 - 0.2 * x], axis=-1)
    picture = alpha[..., None] * foreground + (1 - alpha[..., None]) * background
    return tuple(torch.from_numpy(each).float() for each in (picture, alpha, foreground))


@pytest.mark.parametrize(("size", "longest_side"), [((96, 128), 512), ((160, 120), 512), ((400, 300), 128)])
def test_a_known_alpha_is_found(size, longest_side):
    picture, alpha, foreground = composite(*size)
    trimap = trimap_of(alpha, (1e-6, 1 - 1e-6))
    unknown = trimap == 0.5
    found, colours = matte(picture, trimap, longest_side)
    assert (found.shape, colours.shape, found.dtype) == (alpha.shape, picture.shape, torch.float32)
    assert (found - alpha)[unknown].abs().mean() < 0.05
    assert torch.equal(found[~unknown], alpha[~unknown].round())
    # The old background is gone from the colours of the edge.
    edge = (alpha > 0.3) & (alpha < 0.9)
    assert (colours - foreground)[edge].abs().mean() < 0.25 * (picture - foreground)[edge].abs().mean()


def test_a_trimap_is_cut_at_both_thresholds():
    probability = torch.tensor([[0.0, 0.2, 0.21], [0.69, 0.7, 1.0]])
    assert trimap_of(probability, (0.2, 0.7)).tolist() == [[0, 0, 0.5], [0.5, 1, 1]]
    with pytest.raises(NoSubjectError, match="No subject was found: its probability is 0.40 at most, and 0.60 is"):
        trimap_of(torch.full((4, 4), 0.4))
    with pytest.raises(ValueError, match="threshold 0.70 is not below the subject's 0.60"):
        trimap_of(probability, (0.7, 0.6))


def test_degenerate_trimaps():
    picture, alpha, _ = composite(40, 40)
    for trimap in (torch.ones(40, 40), torch.ones(40, 40).index_fill(0, torch.arange(10), 0.5)):
        found, colours = matte(picture, trimap)
        assert (found == 1).all()
        assert torch.equal(colours, picture)
    found, _ = matte(picture, alpha.round())
    assert torch.equal(found, alpha.round())
    single = torch.full((40, 40), 0.5)
    single[20, 20], single[0, 0] = 1, 0  # a single pixel of each, that is mixed with others when scaled down
    found, _ = matte(picture, single, longest_side=16)
    assert found[20, 20] == 1
    assert found[0, 0] == 0


def test_tiny_pictures_get_one_sentence():
    for size in ((1, 1), (2, 50)):
        with pytest.raises(ValueError, match="too small to cut a subject out"):
            matte(torch.zeros(*size, 3), torch.ones(size))
    assert matte(torch.rand(3, 3, 3), torch.eye(3))[0].equal(torch.eye(3))


def test_the_solver_can_be_stopped():
    picture, alpha, _ = composite(40, 40)

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        matte(picture, trimap_of(alpha, (0.01, 0.99)), on_step=stop)


def test_missing_pymatting_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymatting", None)
    picture, alpha, _ = composite(40, 40)
    with pytest.raises(ValueError, match="needs the package pymatting, .* run pip install pymatting"):
        matte(picture, alpha.round())


def test_softening_is_a_gaussian_blur():
    mask = (torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    expected = gaussian_filter(mask.numpy(), 2.5, mode="nearest", truncate=3.2)
    assert np.abs(soften(mask, 2.5).numpy() - expected).max() < 1e-5
    assert soften(mask, 0) is mask
    assert soften(torch.ones(3, 3), 20).allclose(torch.ones(3, 3))


def test_resizing_to_the_same_size_changes_nothing():
    picture = torch.rand(7, 9, 4)
    assert resized(picture, 7, 9) is picture
    assert resized(torch.full((7, 9, 4), 0.25), 3, 20).allclose(torch.tensor(0.25))
