"""DDIM inversion as a sampling run of the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm.auto import tqdm

from ...blip_qformer.diffusion.ddim_inversion import X0Predictor, invert
from .checks import require_additive_noise
from .conditioning import Conditioning
from .latents import Latent

#: Key of an inverted latent: the model had functions of guidance, which act at guidance 1 too.
INVERTED_WITH_GUIDANCE = "blip_inverted_with_guidance"

#: The host's keys for such functions in the options of a model, set by nodes such as PAG, APG and RescaleCFG.
GUIDANCE_FUNCTIONS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")

SAMPLER, SCHEDULER = "ddim", "ddim_uniform"  # of the stock KSampler whose run comes back to the image


def invert_latent(
    model: ModelPatcher, conditioning: Conditioning, latent: Latent, steps: int, refinements: int
) -> Latent:
    """Invert a latent image, with everything that the conditioning brings.

    Args:
        model: Model that will sample from the result.
        conditioning: Prompt that describes the image.
        latent: Latent of shape [B, C, H, W], as VAE Encode gives it.
        steps: Number of steps of the sampling run.
        refinements: How often each step is corrected.

    Returns:
        The latent that the sampling run starts from.

    Raises:
        ValueError: The model cannot be inverted, or the latent is not one of its images.
    """
    require_additive_noise(model)
    require_image(latent["samples"], model)
    inverted = {**latent, "samples": _invert(model, conditioning, latent["samples"], steps, refinements)}
    inverted[INVERTED_WITH_GUIDANCE] = any(model.model_options.get(key) for key in GUIDANCE_FUNCTIONS)
    inverted.pop("noise_mask", None)  # the sampler would put the inverted latent itself where the mask is black
    return inverted


def sampler_settings(steps: int) -> str:
    """Say in words how KSampler (Advanced) is set to come back to the image.

    Args:
        steps: Number of steps of the inversion.
    """
    settings = {
        "add_noise": "disable",
        "steps": steps,
        "cfg": 1.0,
        "sampler_name": SAMPLER,
        "scheduler": SCHEDULER,
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
    }
    lines = [f"{name}: {value}" for name, value in settings.items()]
    warning = "A sampler that adds noise, such as euler_ancestral, cannot."
    return "\n".join(["KSampler (Advanced) draws the picture again with", *lines, warning])


def require_image(samples: Tensor, model: ModelPatcher) -> None:
    """Refuse a latent that is no image of the model's.

    Args:
        samples: Tensor of the latent.
        model: Model that is to invert it.

    Raises:
        ValueError: The latent has another shape, no rows, nothing in it, or NaN.
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


def _invert(model: ModelPatcher, conditioning: Conditioning, samples: Tensor, steps: int, refinements: int) -> Tensor:
    """Run the sampler below on a latent, [B, C, H, W] -> [B, C, H, W]."""
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
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None,
    disable: bool,
    refinements: int,
) -> Tensor:
    """Invert, as a sampler function of the host.

    Args:
        model: Predicts the clean latent from a noisy one and sigma.
        x: Latent of shape [B, C, H, W], scaled as the U-Net expects it.
        sigmas: Sigmas of the sampling run. They fall as in any other run, as whatever depends on them expects.
        extra_args: Further arguments for the model.
        callback: Is shown each step.
        disable: Whether to leave out the progress bar in the terminal.
        refinements: How often each step is corrected.

    Returns:
        The noisy latent [B, C, H, W] at the first sigma.
    """
    last = len(sigmas) - 2
    rewind = partial(rewind_hooks, model.inner_model, sigmas, extra_args["model_options"])

    def predictor_at(index: int) -> X0Predictor:
        progress.update()
        rewind(index)
        return partial(predict_x0, index)

    def predict_x0(index: int, x: Tensor) -> Tensor:
        # Not left to the progress bar: since 0.9.2 the host does not pass on each of its updates.
        comfy.model_management.throw_exception_if_processing_interrupted()
        denoised = model(x, sigmas[index] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"i": last - index, "x": x, "denoised": denoised})
        return denoised

    sigma_data = model.inner_model.inner_model.model_sampling.sigma_data
    with tqdm(total=last + 1, disable=disable) as progress:
        inverted = invert(predictor_at, x, sigmas, refinements, sigma_data)
    rewind(last + 1)  # leaves the hooks as a run from the first sigma to the last does
    return inverted


def rewind_hooks(guider: comfy.samplers.CFGGuider, sigmas: Tensor, model_options: dict[str, Any], index: int) -> None:
    """Bring hooks with keyframes to where they are before the sampler comes to ``sigmas[index]``.

    They count the sigmas they have seen and only go forward, from the first one on.

    Args:
        guider: Guider of the run.
        sigmas: Sigmas of the sampling run.
        model_options: Options that the hooks change.
        index: Index of the next sigma.
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
