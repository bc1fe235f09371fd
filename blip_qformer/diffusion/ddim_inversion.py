"""DDIM inversion: from a picture back to the noise that DDIM draws it from (arXiv 2010.02502).

Everything here is in ComfyUI's variables, those of arXiv 2206.00364: x = picture + sigma * noise. The
paper and diffusers have the same x over sqrt(1 + sigma^2), which is also what the model is given to read.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoiser = Callable[[Tensor], Tensor]  # x -> the model's guess at the picture in it, of the same shape


def invert(
    denoiser_at: Callable[[int], Denoiser],
    picture: Tensor,
    sigmas: Tensor,
    refinements: int = 0,
    sigma_data: float = 1.0,
) -> Tensor:
    """Walk a sampler's schedule from its end to its start, so that the sampler finds its way back to the picture.

    Args:
        denoiser_at: index -> the model for x with the noise of ``sigmas[index]``; called once for each step, beginning
            with the last. The model is so asked at the sigmas at which the sampler will ask it.
        picture: [B, C, H, W], a latent in the model's own scale.
        sigmas: [steps + 1], the sampler's own, falling to 0.
        refinements, sigma_data: see :func:`inverse_step`.

    Returns:
        [B, C, H, W], x at ``sigmas[0]``.
    """
    x = picture
    for index in reversed(range(len(sigmas) - 1)):
        x = inverse_step(denoiser_at(index), x, sigmas[index + 1], sigmas[index], refinements, sigma_data)
    return x


def inverse_step(
    denoise: Denoiser,
    x: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    refinements: int = 0,
    sigma_data: float = 1.0,
) -> Tensor:
    """One step of DDIM, backwards.

    DDIM goes from y at ``next_sigma`` to x = y + (sigma - next_sigma) (y - denoise(y)) / next_sigma. Backwards, y
    stands on both sides, and is found by putting a guess at it into the right one, which gives the next guess
    (fixed-point iteration, as in arXiv 2309.04907). The first guess is x as the model reads it; one round from there is
    what diffusers' ``DDIMInverseScheduler`` does.

    Args:
        denoise: the model at ``next_sigma``.
        x: [B, C, H, W] at ``sigma``.
        sigma, next_sigma: scalars; ``next_sigma`` is the larger.
        refinements: further rounds, each of which costs one call of the model.
        sigma_data: the standard deviation of pictures that the model was made for; 1 for Stable Diffusion.

    Returns:
        [B, C, H, W] at ``next_sigma``.
    """
    y = x * ((next_sigma**2 + sigma_data**2) / (sigma**2 + sigma_data**2)) ** 0.5
    for _ in range(1 + refinements):
        noise = (y - denoise(y)) / next_sigma
        y = x + (next_sigma - sigma) * noise
    return y
