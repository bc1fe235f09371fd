"""Deterministic DDIM sampling with classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise_schedule import ALPHAS_CUMPROD, NUM_TRAIN_TIMESTEPS, Denoiser


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    uncond: Tensor,
    cond: Tensor,
    noise: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Sample latents by DDIM with eta 0 (arXiv 2010.02502, equation 12) and classifier-free guidance.

    Guidance follows arXiv 2207.12598. Timesteps are spaced as by diffusers' ``DDIMScheduler`` with ``steps_offset=1``
    and ``timestep_spacing="leading"``.

    Args:
        denoiser: The U-Net, which predicts noise.
        uncond: The negative prompt's context of shape [B, T, width].
        cond: The prompt's context of shape [B, T, width].
        noise: Standard normal noise of shape [B, 4, h, w]. It is scaled as ComfyUI scales it for an empty latent, so
            that the same noise gives the same image there.
        num_inference_steps: Number of sampling steps.
        guidance_scale: Weight of the prompt; 1 means no guidance.

    Returns:
        Latents of shape [B, 4, h, w], scaled as the denoiser expects them.
    """
    context = torch.cat([uncond, cond])  # [2B, T, width]
    spacing = NUM_TRAIN_TIMESTEPS // num_inference_steps
    timesteps = [spacing * index + 1 for index in reversed(range(num_inference_steps))]
    latents = (1 - ALPHAS_CUMPROD[timesteps[0]]).sqrt().to(noise) * noise
    for timestep in timesteps:
        batch_timesteps = torch.full((len(context),), timestep, device=latents.device)  # [2B]
        noise_uncond, noise_cond = denoiser(latents.repeat(2, 1, 1, 1), batch_timesteps, context).chunk(2)
        noise_pred = noise_uncond + guidance_scale * (noise_cond - noise_uncond)
        alpha_cumprod = float(ALPHAS_CUMPROD[timestep])
        next_alpha_cumprod = float(ALPHAS_CUMPROD[timestep - spacing]) if timestep > spacing else 1.0
        pred_x0 = (latents - (1 - alpha_cumprod) ** 0.5 * noise_pred) / alpha_cumprod**0.5
        latents = next_alpha_cumprod**0.5 * pred_x0 + (1 - next_alpha_cumprod) ** 0.5 * noise_pred
    return latents
