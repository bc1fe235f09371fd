"""MODEL, CLIP, VAE and CONTROL_NET out of a checkpoint's parts, built through the host's classes at any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import folder_paths
from comfy.supported_models_base import ClipTarget

from ...blip_qformer.checkpoint import CheckpointError, Component
from ...blip_qformer.checkpoint.ldm_config import controlnet_config, text_encoder_config, unet_config, vae_config
from ...blip_qformer.checkpoint.ldm_keys import network_to_ldm

SD15_HEADS = 8


SD15_SCALING_FACTOR = 0.18215


def build_model(unet: Component, vae: Component) -> comfy.model_patcher.ModelPatcher:
    """A diffusers U-Net as a MODEL; the VAE's config tells how large its latents are.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    management = comfy.model_management
    with naming(unet):
        published = unet.state_dict()
        weights = network_to_ldm("unet", published, unet.config)
        config = comfy.supported_models.SD15(unet_config(published))
    config.unet_config["num_heads"] = _heads(unet.config)  # the class has just set SD1.5's own number
    config.latent_format.scale_factor = vae.config.get("scaling_factor", SD15_SCALING_FACTOR)

    parameters = comfy.utils.calculate_parameters(weights)
    dtype = management.unet_dtype(
        model_params=parameters,
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)

    model = config.get_model(weights, "", device=offload_device)
    with naming(unet):
        model.load_model_weights(weights, "")
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def build_clip(text_encoder: Component) -> comfy.sd.CLIP:
    """A CLIP text encoder as a CLIP, with the host's tokenizer and embeddings folder.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    with naming(text_encoder):
        published = text_encoder.state_dict()
        converted = network_to_ldm("text_encoder", published, text_encoder.config)
        sizes = text_encoder_config(published, text_encoder.config.get("num_attention_heads"))
    weights = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
    clip = comfy.sd.CLIP(
        ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
        model_options={"clip_l_model_config": sizes},
    )
    with naming(text_encoder):
        clip.load_sd(weights)
    return clip


def build_vae(vae: Component) -> comfy.sd.VAE:
    """A diffusers VAE as a VAE.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    with naming(vae):
        published = vae.state_dict()
        weights = network_to_ldm("vae", published, vae.config)
        config = vae_config(published)
        built = comfy.sd.VAE(sd=weights, config={"params": config})
    built.downscale_ratio = built.upscale_ratio = 2 ** (len(config["ddconfig"]["ch_mult"]) - 1)
    return built


def build_controlnet(controlnet: Component) -> comfy.controlnet.ControlNet:
    """A diffusers ControlNet as a CONTROL_NET.

    Raises:
        CheckpointError: tensors are missing or too many.
    """
    management = comfy.model_management
    with naming(controlnet):
        published = controlnet.state_dict()
        weights = network_to_ldm("controlnet", published, controlnet.config)
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=comfy.supported_models.SD15.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    load_device = management.get_torch_device()
    cast = management.unet_manual_cast(dtype, load_device)
    network = comfy.cldm.cldm.ControlNet(
        **controlnet_config(published, _heads(controlnet.config)),
        dtype=dtype,
        device=management.unet_offload_device(),
        operations=comfy.ops.pick_operations(dtype, cast),
    )
    with naming(controlnet):
        network.load_state_dict(weights)
    return comfy.controlnet.ControlNet(network, load_device=load_device, manual_cast_dtype=cast)


def _heads(config: dict) -> int:
    """Attention heads of a U-Net; diffusers' configs call their number ``attention_head_dim`` for SD1.5."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or SD15_HEADS
    return heads[0] if isinstance(heads, list) else heads


@contextmanager
def naming(part: Component) -> Iterator[None]:
    """Whatever is wrong with a part's weights is said with the file they came from."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    except RuntimeError as error:  # of which out-of-memory is one, and that is another story
        if "loading state_dict" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{part.path} does not fit its own config ({reason}): download both again.") from error
