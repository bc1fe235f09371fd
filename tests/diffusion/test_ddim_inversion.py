"""DDIM backwards: against diffusers' scheduler, and against a model whose way back has a formula."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler

from blip_qformer.diffusion.ddim_inversion import inverse_step, invert

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule(steps: int) -> tuple[DDIMInverseScheduler, torch.Tensor]:
    """diffusers' scheduler and the same schedule as falling sigmas, 0 at the end."""
    scheduler = DDIMInverseScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    scheduler.set_timesteps(steps)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    return scheduler, torch.cat([((1 - alphas) / alphas).sqrt().flip(0), torch.zeros(1)])


def predicted_noise(model_input: torch.Tensor, timestep: int) -> torch.Tensor:
    """Some model: nothing about it is linear or local."""
    return torch.tanh(model_input.roll(1, -1) + 0.3 * model_input.mean() + timestep / 1000)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_without_refinements_it_is_diffusers_scheduler(steps):
    scheduler, sigmas = schedule(steps)
    image = torch.randn(2, 4, 6, 10, generator=torch.manual_seed(0))

    def predictor_at(index):
        sigma, timestep = sigmas[index], scheduler.timesteps[steps - 1 - index]
        return lambda x: x - sigma * predicted_noise(x / (1 + sigma**2).sqrt(), timestep)

    inverted = invert(predictor_at, image, sigmas) / (1 + sigmas[0] ** 2).sqrt()
    expected = image
    for timestep in scheduler.timesteps:
        expected = scheduler.step(predicted_noise(expected, timestep), timestep, expected).prev_sample
    torch.testing.assert_close(inverted, expected, atol=1e-5, rtol=0)


#: Of images sampled from a normal distribution, direction by direction.
VARIANCES = torch.logspace(-1, 1, 12).view(1, 3, 2, 2).double()


def ideal(sigma: torch.Tensor):
    """x -> the mean of the images that it can be with this noise."""
    return lambda x: x * VARIANCES / (VARIANCES + sigma**2)


def test_refinements_find_the_latents_from_which_ddim_samples_the_image():
    sigmas = schedule(20)[1].double()
    image = torch.randn(1, 3, 2, 2, generator=torch.manual_seed(0)).double() * VARIANCES.sqrt()
    # A step of DDIM multiplies each direction by a number, so the whole way back is a division.
    factor = torch.ones_like(image)
    for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
        factor *= 1 + (lower - sigma) * sigma / (VARIANCES + sigma**2)

    def error(refinements: int) -> float:
        inverted = invert(lambda index: ideal(sigmas[index]), image, sigmas, refinements)
        return (inverted * factor - image).abs().max().item()

    errors = [error(refinements) for refinements in (0, 1, 2, 4, 8, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-9


def test_the_model_is_asked_where_the_sampler_will_ask_it():
    asked = []

    def predictor_at(index):
        return lambda x: asked.append(index) or x

    invert(predictor_at, torch.ones(1, 4, 2, 2), torch.tensor([9.0, 3.0, 1.0, 0.0]), refinements=1)
    assert asked == [2, 2, 1, 1, 0, 0]


def test_the_first_estimate_is_the_image_as_the_model_reads_it():
    estimates = []
    x = torch.randn(1, 4, 2, 2)
    inverse_step(lambda y: estimates.append(y) or y, x, torch.tensor(1.0), torch.tensor(3.0), sigma_data=0.5)
    torch.testing.assert_close(estimates[0] / (3**2 + 0.5**2) ** 0.5, x / (1**2 + 0.5**2) ** 0.5)
