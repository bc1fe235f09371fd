"""SD1.5's noise schedule and DDIM, in torch alone: fine-tuning runs where diffusers is not installed."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise_schedule import ALPHAS_CUMPROD, NUM_TRAIN_TIMESTEPS, Denoiser


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser, without: Tensor, with_prompt: Tensor, noise: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """DDIM without added noise (arXiv 2010.02502, equation 12), with classifier-free guidance (arXiv 2207.12598).

    Args:
        without, with_prompt: contexts [B, T, width] of the negative prompt and the prompt.
        noise: [B, 4, h, w], standard normal. It is scaled as ComfyUI scales it for an empty latent, so that the same
            noise gives the same picture there.

    Returns:
        Latents [B, 4, h, w], scaled as the denoiser has them.
    """
    context = torch.cat([without, with_prompt])  # [2B, T, width]
    spacing = NUM_TRAIN_TIMESTEPS // steps
    timesteps = [spacing * number + 1 for number in reversed(range(steps))]
    latents = (1 - ALPHAS_CUMPROD[timesteps[0]]).sqrt().to(noise) * noise
    for timestep in timesteps:
        both = torch.full((len(context),), timestep, device=latents.device)
        plain, prompted = denoiser(latents.repeat(2, 1, 1, 1), both, context).chunk(2)
        predicted = plain + guidance * (prompted - plain)
        share = float(ALPHAS_CUMPROD[timestep])
        after = float(ALPHAS_CUMPROD[timestep - spacing]) if timestep > spacing else 1.0
        clean = (latents - (1 - share) ** 0.5 * predicted) / share**0.5
        latents = after**0.5 * clean + (1 - after) ** 0.5 * predicted
    return latents
