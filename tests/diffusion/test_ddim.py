"""DDIM against diffusers' scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from blip_qformer.diffusion.ddim import ddim_sample
from blip_qformer.pipeline import SCHEDULER_CONFIG


@pytest.mark.parametrize("steps", [1, 10, 25])
def test_ddim_is_diffusers_own(steps):
    def denoise(noisy, timesteps, context):
        own = timesteps / 1000 + context.sum(dim=(1, 2))  # [B]
        return (noisy * 0.7 + own[:, None, None, None]).sin()

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    uncond, cond = torch.tensor([0.1, 0.3]), torch.tensor([0.2, -0.4])
    uncond, cond = uncond[:, None, None], cond[:, None, None]  # [2, 1, 1]
    scheduler = DDIMScheduler.from_config(SCHEDULER_CONFIG, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    latents = (1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt() * noise
    for timestep in scheduler.timesteps:
        noise_uncond, noise_cond = (denoise(latents, timestep.expand(2), context) for context in (uncond, cond))
        latents = scheduler.step(noise_uncond + 3 * (noise_cond - noise_uncond), timestep, latents).prev_sample
    sampled = ddim_sample(denoise, uncond, cond, noise, num_inference_steps=steps, guidance_scale=3)
    torch.testing.assert_close(sampled, latents, atol=1e-4, rtol=1e-4)
