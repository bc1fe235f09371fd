"""A small U-Net and what it is fine-tuned on."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests import oracle, tiny
from tests.finetune.tuning import LATENT, WIDTH


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return oracle.randomized(UNet2DConditionModel(**tiny.SIZES["unet"]), 0)


@pytest.fixture
def latents() -> torch.Tensor:
    """Four images."""
    return torch.randn(4, *LATENT, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(2))
