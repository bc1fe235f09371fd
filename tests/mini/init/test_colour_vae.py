"""A VAE's initial weights: it scales an image down and up again."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from mini.init.colour_vae import LOG_VARIANCE, initialise_vae


def new_vae(widths: list[int]) -> AutoencoderKL:
    torch.manual_seed(0)
    levels = len(widths)
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    ).requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Soft images of very different brightness and contrast [6, 3, 32, 32] in -1..1."""
    coarse = torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    soft = F.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)
    contrast, brightness = (torch.linspace(*ends, 6)[:, None, None, None] for ends in ((1, 0.05), (-0.4, 0.4)))
    return (soft * contrast + brightness).clamp(-1, 1)


@pytest.mark.parametrize("widths", [[96, 32, 96], [96, 96, 96], [128, 64, 128]])
def test_it_begins_with_the_image(images, widths):
    vae = new_vae(widths)
    initialise_vae(vae)
    latents = vae.encode(images).latent_dist.mean
    small = F.avg_pool2d(images, 4)
    assert (latents[:, :3] - small).abs().mean() < 0.15
    error = (vae.decode(latents).sample - images).abs().mean()
    assert error < 0.15
    assert error < 0.5 * (images - images.mean()).abs().mean()


def test_brightness_is_kept(images):
    """The norms of random weights remove it."""
    errors = {}
    for initialised in (False, True):
        vae = new_vae([96, 32, 96])
        if initialised:
            initialise_vae(vae)
        found = vae.decode(vae.encode(images).latent_dist.mean).sample.mean(dim=(2, 3))
        errors[initialised] = (found - images.mean(dim=(2, 3))).abs().mean()
    assert errors[True] < 0.1
    assert errors[True] < 0.3 * errors[False]


def test_it_begins_with_little_noise(images):
    vae = new_vae([96, 32, 96])
    initialise_vae(vae)
    std = vae.encode(images).latent_dist.std
    assert std.mean().item() == pytest.approx(math.exp(LOG_VARIANCE / 2), rel=0.3)


def test_it_still_has_random_weights_to_learn_with():
    vae, initialised = new_vae([96, 32, 96]), new_vae([96, 32, 96])
    initialise_vae(initialised)
    for (name, before), after in zip(vae.named_parameters(), initialised.parameters(), strict=True):
        if name.endswith(".weight") and before.ndim == 4:
            assert after.std() > 0, name
