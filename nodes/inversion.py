"""DDIM Inversion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm.auto import tqdm

from ..blip_qformer.attention.inversion import Denoiser, invert
from .conditioning import Conditioning
from .latents import Latent
from .types import CATEGORY, advanced, io

SAMPLER, SCHEDULER = "ddim", "ddim_uniform"


class DDIMInversion(io.ComfyNode):
    """The latent from which stock DDIM sampling draws a given picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIPDiffusionDDIMInversion",
            display_name="DDIM Inversion",
            category=CATEGORY,
            description="Finds the noise that a picture of yours could have been drawn from. KSampler (Advanced), set "
            "as the output settings says, draws the picture again from it, or with another prompt an edit of it.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will draw from the latent. SD1.5 and SDXL work, Flux not."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="A prompt that describes the picture, with its ControlNet if the drawing will have one.",
                ),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode. A batch is inverted row by row."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="The same number as in the KSampler (Advanced) that draws from the latent. More steps find "
                    "the picture more exactly.",
                ),
                advanced(
                    io.Int.Input(
                        "refinements",
                        default=1,
                        min=0,
                        max=20,
                        tooltip="How often each step is corrected, so that drawing comes back to the picture more "
                        "exactly. Each correction takes as long as the inversion without any; 0 is plain DDIM "
                        "inversion.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="For KSampler (Advanced), which must not add noise to it."
                ),
                io.String.Output(
                    display_name="settings", tooltip="How to set the KSampler (Advanced) that finds the picture again."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        conditioning: Conditioning,
        latent: Latent,
        steps: int,
        refinements: int,
    ) -> io.NodeOutput:
        check_model(model)
        check_picture(latent["samples"], model)
        inverted = {**latent, "samples": invert_in_host(model, conditioning, latent["samples"], steps, refinements)}
        inverted.pop("noise_mask", None)  # the sampler would put the inverted latent itself where the mask is black
        return io.NodeOutput(inverted, settings_text(steps))


def check_model(model: ModelPatcher) -> None:
    """Refuse a model whose sampling cannot start from a latent.

    Raises:
        ValueError: it mixes picture and noise instead of adding them.
    """
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.EPS):
        raise ValueError(
            f"This model is of the kind {type(model.model).__name__}, whose sampling throws the latent away when it "
            "starts, so that nothing drawn from an inverted one comes back: use SD1.5, SD2 or SDXL."
        )


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

    def denoiser_at(index: int) -> Denoiser:
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
        inverted = invert(denoiser_at, x, sigmas, refinements, sigma_data)
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


def settings_text(steps: int) -> str:
    """What to choose in the stock sampler, in its own words."""
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


NODES = [DDIMInversion]
