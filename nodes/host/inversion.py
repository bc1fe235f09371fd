"""DDIM Inversion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm.auto import tqdm

from ...blip_qformer.diffusion.ddim_inversion import X0Predictor, invert
from .conditioning import Conditioning

SAMPLER, SCHEDULER = "ddim", "ddim_uniform"


def check_picture(samples: Tensor, model: ModelPatcher) -> None:
    """Refuse a latent that is no picture of the model's.

    Raises:
        ValueError: it has another shape, no rows, nothing in it, or NaN.
    """
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"The latent is {' x '.join(map(str, samples.shape))}, but this model reads rows x {channels} x height x "
            "width: encode the picture with the VAE of the same checkpoint."
        )
    if not samples.count_nonzero():
        raise ValueError("The latent is empty, so there is no picture to invert: connect VAE Encode.")
    if not samples.isfinite().all():
        raise ValueError("The latent holds NaN or infinite numbers: look at the picture before VAE Encode.")


def invert_in_host(
    model: ModelPatcher, conditioning: Conditioning, samples: Tensor, steps: int, refinements: int
) -> Tensor:
    """The library's inversion inside a sampling run of the host, with everything that the conditioning brings.

    Args:
        samples: [B, C, H, W], as VAE Encode gives it.

    Returns:
        [B, C, H, W], as the sampler takes it.
    """
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), SCHEDULER, steps)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})  # at guidance 1 the sampler does not ask for a negative either
    inverted = guider.sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.KSAMPLER(sample_backwards, extra_options={"refinements": refinements}),
        sigmas,
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    return inverted.to(comfy.model_management.intermediate_device())


@torch.no_grad()
def sample_backwards(
    model: comfy.samplers.KSamplerX0Inpaint,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict,
    callback: Callable[[dict], None] | None,
    disable: bool,
    refinements: int,
) -> Tensor:
    """A sampler as the host calls it: sigmas fall as always, so that what depends on them finds them as it expects."""
    last = len(sigmas) - 2
    rewind = partial(rewind_hooks, model.inner_model, sigmas, extra_args["model_options"])

    def predictor_at(index: int) -> X0Predictor:
        terminal.update()
        rewind(index)
        return partial(denoise, index)

    def denoise(index: int, x: Tensor) -> Tensor:
        denoised = model(x, sigmas[index] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"i": last - index, "x": x, "denoised": denoised})
        return denoised

    sigma_data = model.inner_model.inner_model.model_sampling.sigma_data
    with tqdm(total=last + 1, disable=disable) as terminal:
        inverted = invert(predictor_at, x, sigmas, refinements, sigma_data)
    rewind(last + 1)  # leaves the hooks as a run from the first sigma to the last does
    return inverted


def rewind_hooks(guider: comfy.samplers.CFGGuider, sigmas: Tensor, model_options: dict, index: int) -> None:
    """Bring hooks with keyframes to where they stand before the sampler comes to ``sigmas[index]``.

    They count what they have seen and only go forward, from the first sigma on.
    """
    groups = {cond["hooks"] for cond in guider.conds["positive"] if cond.get("hooks") is not None}
    if all(hook.hook_keyframe.is_empty() for group in groups for hook in group.hooks):
        return
    guider.model_patcher.clear_cached_hook_weights()
    for group in groups:
        group.reset()
    for sigma in sigmas[:index]:
        for group in groups:
            guider.model_patcher.prepare_hook_patches_current_keyframe(sigma[None], group, model_options)
