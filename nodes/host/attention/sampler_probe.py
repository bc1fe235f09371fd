"""Whether a sampler comes back to the photograph of an inverted latent: found by running it where the answer is known.

If the prediction is the same clean latent x0 at every noise level, the probability-flow ODE (arXiv 2206.00364, equation
1) has straight solutions: x = x0 + sigma * n, with n fixed by the first latent. A solver of any order stays on that
line. A sampler that adds noise leaves it, and so does one that steps by another prediction than the guider's, such as
cfg_pp's by the negative's. It is not told by its name, because eta, s_noise or s_churn decide.
"""

from __future__ import annotations

import math
from typing import Any, cast

import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

#: Distance from the line, in units of the latents' spread, up to which a sampler counts as staying on it. The host's
#: solvers stay within 3e-5, ipndm_v with its inexact coefficients within 0.02; noise leads 0.45 and more away.
TOLERANCE = 0.1

SHAPE = (1, 4, 8, 8)  # of the latents that a sampler is tried on

INSTEAD = "choose ddim, or switch source_unguided off in Prompt-to-Prompt Edit."


def require_exact_sampler(sampler: comfy.samplers.Sampler, sigmas: Tensor, model: ModelPatcher) -> None:
    """Refuse a sampler that does not come back to the photograph of an inverted latent.

    Args:
        sampler: Sampler of the host, with the options of its node.
        sigmas: Noise levels of the run, of shape [steps + 1], falling.
        model: Model of the run, which is not called.

    Raises:
        ValueError: The sampler adds or takes away noise, goes by the negative prompt's prediction, or cannot be tried.
    """
    name = name_of(sampler)
    try:
        distance = distance_from_line(sampler, sigmas, model, has_other_negative=False)
        distance_with_negative = distance_from_line(sampler, sigmas, model, has_other_negative=True)
    except Exception as error:  # anything may happen in a sampler of another pack
        raise ValueError(
            f"{name} failed in a trial run ({error}), so that nobody knows whether the photograph comes back: {INSTEAD}"
        ) from error
    if not distance <= TOLERANCE:
        raise ValueError(
            f"{name} adds or takes away noise of its own, so that the photograph does not come back: {INSTEAD}"
        )
    if not distance_with_negative <= TOLERANCE:
        raise ValueError(
            f"{name} steps by the negative prompt's prediction, so that the photograph does not come back: {INSTEAD}"
        )


def distance_from_line(
    sampler: comfy.samplers.Sampler, sigmas: Tensor, model: ModelPatcher, *, has_other_negative: bool
) -> float:
    """Run a sampler on a known prediction.

    Args:
        sampler: Sampler of the host.
        sigmas: Noise levels of the run, of shape [steps + 1], falling.
        model: Model whose noise schedule the sampler may ask for.
        has_other_negative: Whether the negative's prediction is another one than the guider's.

    Returns:
        The greatest root mean square distance from the line of all latents that the sampler hands the model, and of the
        one it returns, in units of the latents' spread at their noise level, sqrt(1 + sigma ** 2).
    """
    sigmas = sigmas.cpu().float()
    with torch.random.fork_rng(devices=[]):  # the run itself gets the random numbers that it gets without a trial
        generator = torch.Generator().manual_seed(0)
        x0, n, other = (torch.randn(SHAPE, generator=generator) for _ in range(3))
        guider = KnownPrediction(model, x0, n, x0 + 10 * other if has_other_negative else x0)
        start = x0 + sigmas[0] * n
        options = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": 0}
        zeros = torch.zeros(SHAPE)
        end = cast(Any, sampler).sample(guider, sigmas, options, lambda *_: None, zeros, start, None, True)
    # dpm_fast and dpm_adaptive return at the last sigma before 0.
    at_the_end = min(guider.distance(end, float(sigma)) for sigma in sigmas[-2:])
    return torch.tensor([at_the_end, *guider.distances]).max().item()  # NaN if one of them is


class KnownPrediction(comfy.samplers.CFGGuider):
    """A guider whose prediction is the same at every noise level.

    Args:
        model: Model whose noise schedule a sampler may ask for.
        denoised: Its prediction x0, of shape [B, 4, h, w].
        n: Direction of the line x0 + sigma * n.
        negative: The negative's prediction.
    """

    def __init__(self, model: ModelPatcher, denoised: Tensor, n: Tensor, negative: Tensor) -> None:
        super().__init__(model)
        self.inner_model = PatchedObjects(model)
        self.denoised, self.n, self.negative = denoised, n, negative
        self.distances: list[float] = []

    def __call__(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """Predict, as the host's samplers call a guider.

        Args:
            x: Latents of shape [B, 4, h, w].
            timestep: Noise level of each row, of shape [B].
            model_options: Options, in which a sampler may have put a function that is shown all predictions.
            seed: The host's.

        Returns:
            The known prediction.
        """
        self.distances.append(self.distance(x, float(timestep.max())))
        denoised, model_options = F.interpolate(self.denoised, x.shape[-2:]), model_options or {}
        for post_cfg in model_options.get("sampler_post_cfg_function", []):
            predictions = {"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": self.negative}
            conds = {"cond": None, "uncond": None, "cond_scale": 1.0, "model": self.inner_model}
            called = {"sigma": timestep, "input": x, "model_options": model_options}
            denoised = post_cfg({**predictions, **conds, **called})
        return denoised

    def distance(self, x: Tensor, sigma: float) -> float:
        """Return the distance from the line in units of the spread, infinite for latents of another size.

        Args:
            x: Latents that a sampler came to.
            sigma: Their noise level.
        """
        if x.shape != self.denoised.shape:
            return math.inf
        distance = (x - self.denoised - sigma * self.n).float().square().mean().sqrt().item()
        return distance / math.sqrt(1 + sigma**2)


class PatchedObjects:
    """A model's attributes, those that nodes replaced on its patcher in place of its own.

    Args:
        model: Model that may not be loaded yet.
    """

    def __init__(self, model: ModelPatcher) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model as a run would find it."""
        return self._model.get_model_object(name)


def name_of(sampler: comfy.samplers.Sampler) -> str:
    """Return a sampler's name as its menu has it, or that of its class."""
    function = getattr(sampler, "sampler_function", sampler.__class__)
    return function.__name__.removeprefix("sample_")
