"""MODEL, CLIP and VAE out of a checkpoint's parts, built through the host's own classes at whatever size they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import folder_paths
from comfy.supported_models_base import ClipTarget
from torch import Tensor

from ..blip_qformer.checkpoint import CheckpointError, Part
from ..blip_qformer.checkpoint.stable_diffusion import (
    text_encoder_config,
    text_encoder_to_ldm,
    unet_config,
    unet_to_ldm,
    vae_config,
    vae_to_ldm,
)

SD15_HEADS = 8
SD15_SCALING_FACTOR = 0.18215


def build_model(unet: Part, vae: Part) -> comfy.model_patcher.ModelPatcher:
    """A diffusers U-Net as a MODEL; the VAE's config tells how large its latents are.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    management = comfy.model_management
    weights = _converted(unet, unet_to_ldm)
    config = comfy.supported_models.SD15(unet_config(unet.weights, _heads(unet.config)))
    config.unet_config["num_heads"] = _heads(unet.config)
    config.latent_format.scale_factor = vae.config.get("scaling_factor", SD15_SCALING_FACTOR)

    parameters = comfy.utils.calculate_parameters(unet.weights)
    dtype = management.unet_dtype(
        model_params=parameters,
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(unet.weights),
    )
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)

    model = config.get_model(weights, "", device=offload_device)
    model.load_model_weights(weights, "")
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def build_clip(text_encoder: Part) -> comfy.sd.CLIP:
    """A CLIP text encoder as a CLIP, with the host's tokenizer and embeddings folder.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    converted = _converted(text_encoder, text_encoder_to_ldm)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
    sizes = text_encoder_config(text_encoder.weights, text_encoder.config.get("num_attention_heads"))
    clip = comfy.sd.CLIP(
        ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
        model_options={"clip_l_model_config": sizes},
    )
    clip.load_sd(weights)
    return clip


def build_vae(vae: Part) -> comfy.sd.VAE:
    """A diffusers VAE as a VAE.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    weights = _converted(vae, vae_to_ldm)
    config = vae_config(vae.weights)
    built = comfy.sd.VAE(sd=weights, config={"params": config})
    built.downscale_ratio = built.upscale_ratio = 2 ** (len(config["ddconfig"]["ch_mult"]) - 1)
    return built


def _heads(config: dict) -> int:
    """Attention heads of a U-Net; diffusers' configs call their number ``attention_head_dim`` for SD1.5."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or SD15_HEADS
    return heads[0] if isinstance(heads, list) else heads


def _converted(part: Part, convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A part's weights in the host's names; every tensor must be known, and none may be missing."""
    try:
        return convert(part.weights)
    except ValueError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
