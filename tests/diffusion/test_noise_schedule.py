"""The noise schedule against diffusers' scheduler."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler

from blip_qformer.diffusion.noise_schedule import ALPHAS_CUMPROD, NUM_TRAIN_TIMESTEPS, add_noise
from blip_qformer.pipeline import SCHEDULER_CONFIG


def test_alphas_cumprod_are_diffusers_own():
    scheduler = DDPMScheduler.from_config(SCHEDULER_CONFIG)
    assert ALPHAS_CUMPROD.shape == (NUM_TRAIN_TIMESTEPS,)
    torch.testing.assert_close(ALPHAS_CUMPROD, scheduler.alphas_cumprod, atol=1e-6, rtol=0)


def test_noise_is_added_as_by_diffusers():
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    expected = DDPMScheduler.from_config(SCHEDULER_CONFIG).add_noise(latents, noise, timesteps)
    torch.testing.assert_close(add_noise(latents, noise, timesteps), expected, atol=1e-5, rtol=0)
