"""The noise schedule of SD1.5 ("scaled_linear" in diffusers) and the forward diffusion process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

#: ``(noisy latents [B, 4, h, w], timesteps [B], context [B, T, width]) -> predicted noise [B, 4, h, w]``
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # first and last beta; their square roots are evenly spaced

BETAS = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS) ** 2

#: The share of the signal in the variance at each timestep, [1000] (alpha-bar in arXiv 2006.11239).
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, dim=0)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Sample from q(x_t | x_0) (arXiv 2006.11239, equation 4).

    Args:
        latents: Clean latents of shape [B, 4, h, w], scaled as the U-Net expects them.
        noise: Standard normal noise of the same shape.
        timesteps: Timesteps of shape [B], from 0 to 999.

    Returns:
        Noisy latents of shape [B, 4, h, w].
    """
    alphas_cumprod = rearrange(ALPHAS_CUMPROD.to(latents.device)[timesteps], "b -> b 1 1 1")
    return alphas_cumprod.sqrt() * latents + (1 - alphas_cumprod).sqrt() * noise
