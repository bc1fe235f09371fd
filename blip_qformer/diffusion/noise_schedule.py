"""SD1.5's noise schedule and DDIM, in torch alone: fine-tuning runs where diffusers is not installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

#: ``(noisy latents [B, 4, h, w], timesteps [B], context [B, T, width]) -> predicted noise [B, 4, h, w]``
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


NUM_TRAIN_TIMESTEPS = 1000


BETAS = (0.00085, 0.012)  # of the first and last timestep; their roots are evenly spaced between


#: alpha-bar of each timestep [1000]: how much of the variance is still the picture's.
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, NUM_TRAIN_TIMESTEPS) ** 2, dim=0)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """q(x_t | x_0) of arXiv 2006.11239, equation 4; [B, 4, h, w] and timesteps [B] -> [B, 4, h, w]."""
    shares = rearrange(ALPHAS_CUMPROD.to(latents.device)[timesteps], "b -> b 1 1 1")
    return shares.sqrt() * latents + (1 - shares).sqrt() * noise
