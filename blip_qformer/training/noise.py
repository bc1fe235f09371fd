"""SD1.5's noise schedule and DDIM, in torch alone: fine-tuning runs where diffusers is not installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

#: ``(noisy latents [B, 4, h, w], timesteps [B], context [B, T, width]) -> predicted noise [B, 4, h, w]``
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]

TIMESTEPS = 1000
BETAS = (0.00085, 0.012)  # of the first and last timestep; their roots are evenly spaced between

#: alpha-bar of each timestep [1000]: how much of the variance is still the picture's.
SIGNAL_SHARES = torch.cumprod(1 - torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TIMESTEPS) ** 2, dim=0)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """q(x_t | x_0) of arXiv 2006.11239, equation 4; [B, 4, h, w] and timesteps [B] -> [B, 4, h, w]."""
    shares = rearrange(SIGNAL_SHARES.to(latents.device)[timesteps], "b -> b 1 1 1")
    return shares.sqrt() * latents + (1 - shares).sqrt() * noise


@torch.no_grad()
def draw_latents(
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
    spacing = TIMESTEPS // steps
    timesteps = [spacing * number + 1 for number in reversed(range(steps))]
    latents = (1 - SIGNAL_SHARES[timesteps[0]]).sqrt().to(noise) * noise
    for timestep in timesteps:
        both = torch.full((len(context),), timestep, device=latents.device)
        plain, prompted = denoiser(latents.repeat(2, 1, 1, 1), both, context).chunk(2)
        predicted = plain + guidance * (prompted - plain)
        share = float(SIGNAL_SHARES[timestep])
        after = float(SIGNAL_SHARES[timestep - spacing]) if timestep > spacing else 1.0
        clean = (latents - (1 - share) ** 0.5 * predicted) / share**0.5
        latents = after**0.5 * clean + (1 - after) ** 0.5 * predicted
    return latents
