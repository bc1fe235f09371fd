"""MODEL, CLIP and VAE out of a checkpoint's parts, built through the host's own classes at whatever size they have."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import folder_paths
from comfy.supported_models_base import ClipTarget

from ..blip_qformer.checkpoint import CheckpointError, Part
from ..blip_qformer.checkpoint.names import REMEDY, listed
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
    config.set_inference_dtype(
        dtype, management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    )

    weights = unet_to_ldm(unet.weights)
    model = config.get_model(weights, "", device=management.unet_inital_load_device(parameters, dtype))
    _check_names(model.diffusion_model.state_dict().keys(), weights.keys(), unet.path)
    model.load_model_weights(weights, "")
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def build_clip(text_encoder: Part) -> comfy.sd.CLIP:
    """A CLIP text encoder as a CLIP, with the host's tokenizer and embeddings folder.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    weights = {name.removeprefix("transformer."): w for name, w in text_encoder_to_ldm(text_encoder.weights).items()}
    sizes = text_encoder_config(weights, text_encoder.config.get("num_attention_heads"))
    clip = comfy.sd.CLIP(
        ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
        model_options={"clip_l_model_config": sizes},
    )
    # SD1.5 never uses CLIP's projection, and no published text encoder brings one.
    _check_names(
        clip.cond_stage_model.clip_l.transformer.state_dict().keys() - {"text_projection.weight"},
        weights,
        text_encoder.path,
    )
    clip.load_sd(weights)
    return clip


def build_vae(vae: Part) -> comfy.sd.VAE:
    """A diffusers VAE as a VAE.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    weights = vae_to_ldm(vae.weights)
    config = vae_config(vae.weights)
    built = comfy.sd.VAE(sd=weights, config={"params": config})
    _check_names(built.first_stage_model.state_dict().keys(), weights.keys(), vae.path)
    built.downscale_ratio = built.upscale_ratio = 2 ** (len(config["ddconfig"]["ch_mult"]) - 1)
    return built


def _heads(config: dict) -> int:
    """Attention heads of a U-Net; diffusers' configs call their number ``attention_head_dim`` for SD1.5."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or SD15_HEADS
    return heads[0] if isinstance(heads, list) else heads


def _check_names(expected: Collection[str], given: Collection[str], path: Path) -> None:
    if missing := [name for name in expected if name not in given]:
        raise CheckpointError(f"{path} lacks {listed(missing)}: {REMEDY}")
    if unexpected := [name for name in given if name not in expected]:
        raise CheckpointError(f"{path} holds {listed(unexpected)}, which it should not have: {REMEDY}")
