"""Cutting out against a known alpha, degenerate trimaps, and what is asked of larger images."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from blip_qformer.imaging.masks import NoSubjectError
from blip_qformer.imaging.matting import make_trimap, matte


def composed(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A disc with a soft edge of a tenth of the image, on another smooth texture: image, alpha, foreground."""
    y, x = np.mgrid[:height, :width]
    y, x = y / height, x / width
    alpha = np.clip((0.35 - np.hypot(y - 0.5, x - 0.5)) / 0.1 + 0.5, 0, 1)
    foreground = np.stack([0.8 + 0.15 * np.sin(9 * x), 0.3 + 0.1 * y, 0.1 + 0.05 * x], axis=-1)
    background = np.stack([0.1 + 0.1 * y, 0.4 + 0.1 * np.sin(7 * y), 0.8 - 0.2 * x], axis=-1)
    image = alpha[..., None] * foreground + (1 - alpha[..., None]) * background
    return tuple(torch.from_numpy(each).float() for each in (image, alpha, foreground))


@pytest.mark.parametrize(("size", "longest_side"), [((96, 128), 512), ((160, 120), 512), ((400, 300), 128)])
def test_a_known_alpha_is_found(size, longest_side):
    image, alpha, foreground = composed(*size)
    trimap = make_trimap(alpha, (1e-6, 1 - 1e-6))
    unknown = trimap == 0.5
    found, colours = matte(image, trimap, longest_side)
    assert (found.shape, colours.shape, found.dtype) == (alpha.shape, image.shape, torch.float32)
    assert (found - alpha)[unknown].abs().mean() < 0.05
    assert torch.equal(found[~unknown], alpha[~unknown].round())
    # The old background is gone from the colours of the edge.
    edge = (alpha > 0.3) & (alpha < 0.9)
    assert (colours - foreground)[edge].abs().mean() < 0.25 * (image - foreground)[edge].abs().mean()


def test_a_trimap_is_cut_at_both_thresholds():
    probability = torch.tensor([[0.0, 0.2, 0.21], [0.69, 0.7, 1.0]])
    assert make_trimap(probability, (0.2, 0.7)).tolist() == [[0, 0, 0.5], [0.5, 1, 1]]
    with pytest.raises(NoSubjectError, match="No subject was found: its probability is 0.40 at most, and 0.60 is"):
        make_trimap(torch.full((4, 4), 0.4))
    with pytest.raises(ValueError, match="threshold 0.70 is not below the subject's 0.60"):
        make_trimap(probability, (0.7, 0.6))


def test_degenerate_trimaps():
    image, alpha, _ = composed(40, 40)
    for trimap in (torch.ones(40, 40), torch.ones(40, 40).index_fill(0, torch.arange(10), 0.5)):
        found, colours = matte(image, trimap)
        assert (found == 1).all()
        assert torch.equal(colours, image)
    found, _ = matte(image, alpha.round())
    assert torch.equal(found, alpha.round())
    single = torch.full((40, 40), 0.5)
    single[20, 20], single[0, 0] = 1, 0  # a single pixel of each, that is mixed with others when scaled down
    found, _ = matte(image, single, longest_side=16)
    assert found[20, 20] == 1
    assert found[0, 0] == 0


def test_tiny_pictures_get_one_sentence():
    for size in ((1, 1), (2, 50)):
        with pytest.raises(ValueError, match="too small to cut a subject out"):
            matte(torch.zeros(*size, 3), torch.ones(size))
    assert matte(torch.rand(3, 3, 3), torch.eye(3))[0].equal(torch.eye(3))


def test_the_solver_can_be_stopped():
    image, alpha, _ = composed(40, 40)

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        matte(image, make_trimap(alpha, (0.01, 0.99)), on_step=stop)


def test_missing_pymatting_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymatting", None)
    image, alpha, _ = composed(40, 40)
    with pytest.raises(ValueError, match="needs the package pymatting, .* run pip install pymatting"):
        matte(image, alpha.round())
