"""Resizing and cropping."""

from __future__ import annotations

import torch

from blip_qformer.imaging.resizing import center_crop, resize


def test_resizing_to_the_same_size_changes_nothing():
    image = torch.rand(7, 9, 4)
    assert resize(image, 7, 9) is image
    assert resize(torch.full((7, 9, 4), 0.25), 3, 20).allclose(torch.tensor(0.25))


def test_a_center_crop_is_the_middle_of_an_image():
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(300.0), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)], dim=-1)
    assert torch.equal(center_crop(image, 100, 100), image[:, 100:200])
