"""DDIM inversion: from an image back to the noise from which DDIM samples it (arXiv 2010.02502, section 4.3).

Everything here uses ComfyUI's variables, those of arXiv 2206.00364: x = x0 + sigma * noise. The DDIM paper and
diffusers divide the same x by sqrt(1 + sigma^2), which is also what the U-Net is given to read.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: ``x [B, C, H, W] -> the predicted x0 [B, C, H, W]``, at one noise level.
X0Predictor = Callable[[Tensor], Tensor]


def invert(
    predictor_at: Callable[[int], X0Predictor],
    x0: Tensor,
    sigmas: Tensor,
    refinements: int = 0,
    sigma_data: float = 1.0,
) -> Tensor:
    """Follow a sampler's schedule from its end to its start, so that the sampler finds its way back to the image.

    Args:
        predictor_at: Returns the model for x at ``sigmas[index]``. It is called once a step, beginning with the last
            step, so that the model is asked at the same sigmas at which the sampler will ask it.
        x0: Clean latents of shape [B, C, H, W] in the model's own scale.
        sigmas: The sampler's own schedule of shape [steps + 1], falling to 0.
        refinements: Further fixed-point rounds a step, see :func:`inverse_step`.
        sigma_data: Standard deviation of the data, see :func:`inverse_step`.

    Returns:
        The latents of shape [B, C, H, W] at ``sigmas[0]``.
    """
    x = x0
    for index in reversed(range(len(sigmas) - 1)):
        x = inverse_step(predictor_at(index), x, sigmas[index + 1], sigmas[index], refinements, sigma_data)
    return x


def inverse_step(
    predict_x0: X0Predictor,
    x: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    refinements: int = 0,
    sigma_data: float = 1.0,
) -> Tensor:
    """Undo one step of DDIM.

    DDIM goes from y at ``next_sigma`` to x = y + (sigma - next_sigma) (y - predict_x0(y)) / next_sigma. To undo this, y
    must be found, which stands on both sides: an estimate of y put into the right side gives the next estimate
    (fixed-point iteration, arXiv 2309.04907). The first estimate is x, rescaled as the model reads it; one round from
    there is what diffusers' ``DDIMInverseScheduler`` does.

    Args:
        predict_x0: The model at ``next_sigma``.
        x: Latents of shape [B, C, H, W] at ``sigma``.
        sigma: The smaller noise level, a scalar.
        next_sigma: The larger noise level, a scalar.
        refinements: Further rounds, each of which costs one call of the model.
        sigma_data: Standard deviation of the data that the model was made for; 1 for Stable Diffusion.

    Returns:
        Latents of shape [B, C, H, W] at ``next_sigma``.
    """
    y = x * ((next_sigma**2 + sigma_data**2) / (sigma**2 + sigma_data**2)) ** 0.5
    for _ in range(1 + refinements):
        noise = (y - predict_x0(y)) / next_sigma
        y = x + (next_sigma - sigma) * noise
    return y
