"""MODEL, CLIP, VAE and CONTROL_NET from a checkpoint's components.

A U-Net or ControlNet of SD1.5's sizes goes through the host's own loader. The host knows no other sizes, such as the
small model's, so those are built here from the host's classes, with the host's choice of precision and device. VAE and
text encoder take their sizes as an argument, whatever they are.

Like the host's own, each tells the host how the same model is built once more from the same files. A CONTROL_NET does
not, in the host neither: that one copies it in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import ClipTarget
from torch import Tensor

from ...blip_qformer.checkpoint import Checkpoint, CheckpointError, Component
from ...blip_qformer.checkpoint.ldm_config import controlnet_config, text_encoder_config, unet_config, vae_config
from ...blip_qformer.checkpoint.ldm_keys import network_to_ldm
from .mapped_weights import detach_static_model
from .versions import clip_with_weights, dynamic_option, is_dynamic, patcher_class, remember_loader

SD15_HEADS = 8

SD15_SCALING_FACTOR = 0.18215

QFORMER_ALONE = "To use its Q-Former beside another loader, take Load BLIP-2 Q-Former."

log = logging.getLogger("blip_diffusion")


def build_networks(checkpoint: Checkpoint) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Build what the stock Load Checkpoint gives: MODEL, CLIP and VAE.

    Args:
        checkpoint: Opened checkpoint.

    Raises:
        CheckpointError: The checkpoint lacks one of the three, or tensors are missing or unknown.
    """
    unet, text_encoder, vae = (checkpoint.require(name, QFORMER_ALONE) for name in ("unet", "text_encoder", "vae"))
    if checkpoint.subject is not None:
        log.info(
            "%s also holds a tuned subject: Load Tuned Subject gives it to Subject Prompt Compose.", checkpoint.path
        )
    return build_model(unet, vae), build_clip(text_encoder), build_vae(vae)


def load_converted(path: Path) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Load a converted file as the stock Load Checkpoint does.

    Args:
        path: File that converting wrote.

    Raises:
        CheckpointError: The host does not know it, as one of sizes other than SD1.5's.
    """
    try:
        loaded = comfy.sd.load_checkpoint_guess_config(
            str(path), embedding_directory=folder_paths.get_folder_paths("embeddings")
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is no Stable Diffusion 1.5 that ComfyUI knows ({error}): download the model again, or choose a "
            "whole BLIP-Diffusion folder."
        ) from error
    return cast(tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE], loaded[:3])


def load_converted_controlnet(path: Path) -> comfy.controlnet.ControlNet:
    """Load a converted ControlNet as the stock Load ControlNet Model does.

    Args:
        path: File that converting wrote.

    Raises:
        CheckpointError: The host does not know it.
    """
    if (loaded := comfy.controlnet.load_controlnet(str(path))) is None:
        raise CheckpointError(f"{path} is no ControlNet that ComfyUI knows: delete it, and download it again.")
    return cast(comfy.controlnet.ControlNet, loaded)


def build_model(unet: Component, vae: Component, disable_dynamic: bool = False) -> ModelPatcher:
    """Build a MODEL.

    Args:
        unet: U-Net in diffusers' names.
        vae: VAE whose config tells how its latents are scaled.
        disable_dynamic: Whether its memory must not be dynamic, whatever the host does.

    Raises:
        CheckpointError: Tensors are missing or unknown.
    """
    with naming(unet):
        published = unet.weights()
        state_dict = network_to_ldm("unet", published, unet.config)
        model = _load_model(state_dict, unet_config(published, _attention_heads(unet.config)), disable_dynamic)
        detach_static_model(model, published.values())
    model.model.latent_format.scale_factor = vae.config.get("scaling_factor") or SD15_SCALING_FACTOR
    remember_loader(model, build_model, unet, vae)
    return model


def _load_model(state_dict: dict[str, Tensor], sizes: dict[str, Any], disable_dynamic: bool) -> ModelPatcher:
    """Load a U-Net in LDM's names; the dictionary is empty afterwards."""
    if _is_known_to_host(state_dict, sizes):
        load = comfy.sd.load_diffusion_model_state_dict
        return cast(ModelPatcher, load(state_dict, **dynamic_option(load, disable_dynamic)))
    management = comfy.model_management
    config = comfy.supported_models.SD15(sizes)
    config.unet_config["num_heads"] = sizes["num_heads"]  # the class has just set SD1.5's own number
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    manual_cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, manual_cast)
    model = config.get_model(state_dict, "", device=offload_device)
    patcher = patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)
    # Dynamic weights are the given tensors; only a host that has them knows the argument.
    model.load_model_weights(state_dict, "", **({"assign": True} if is_dynamic(patcher) else {}))
    return patcher


def build_clip(text_encoder: Component, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Build a CLIP, with the host's tokenizer and embeddings folder.

    The host's ``load_text_encoder_state_dicts`` would make the same of SD1.5's sizes, but warn at each load that there
    is no ``text_projection``, which SD1.5 does not use.

    Args:
        text_encoder: CLIP text model in diffusers' names.
        disable_dynamic: Whether its memory must not be dynamic, whatever the host does.

    Raises:
        CheckpointError: Tensors are missing or unknown.
    """
    with naming(text_encoder):
        published = text_encoder.weights()
        converted = network_to_ldm("text_encoder", published, text_encoder.config)
        sizes = text_encoder_config(published, text_encoder.config.get("num_attention_heads"))
        state_dict = {f"clip_l.{name}": tensor for name, tensor in converted.items()}
        clip = clip_with_weights(
            ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
            state_dict,
            disable_dynamic,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            parameters=comfy.utils.calculate_parameters(state_dict),
            model_options={"clip_l_model_config": sizes},
        )
        detach_static_model(clip.patcher, published.values())
    remember_loader(clip.patcher, _clip_patcher, text_encoder)
    return clip


def _clip_patcher(text_encoder: Component, disable_dynamic: bool = False) -> ModelPatcher:
    return build_clip(text_encoder, disable_dynamic).patcher


def build_vae(vae: Component) -> comfy.sd.VAE:
    """Build a VAE.

    Args:
        vae: VAE in diffusers' names.

    Raises:
        CheckpointError: Tensors are missing or unknown.
    """
    with naming(vae):
        published = vae.weights()
        state_dict = network_to_ldm("vae", published, vae.config)
        config = vae_config(published)
        built = comfy.sd.VAE(sd=state_dict, config={"params": config})
        detach_static_model(built.patcher, published.values())
    built.downscale_ratio = built.upscale_ratio = 2 ** (len(config["ddconfig"]["ch_mult"]) - 1)
    remember_loader(built.patcher, _vae_patcher, vae)
    return built


def _vae_patcher(vae: Component, disable_dynamic: bool = False) -> ModelPatcher:
    """Build a VAE's patcher; like the host's own, it leaves dynamic memory to the host's class."""
    return build_vae(vae).patcher


def build_controlnet(controlnet: Component) -> comfy.controlnet.ControlNet:
    """Build a CONTROL_NET.

    Args:
        controlnet: ControlNet in diffusers' names.

    Raises:
        CheckpointError: Tensors are missing or unknown.
    """
    with naming(controlnet):
        published = controlnet.weights()
        state_dict = network_to_ldm("controlnet", published, controlnet.config)
        built = _load_controlnet(state_dict, controlnet_config(published, _attention_heads(controlnet.config)))
        detach_static_model(built.control_model_wrapped, published.values())
    return built


def _load_controlnet(state_dict: dict[str, Tensor], sizes: dict[str, Any]) -> comfy.controlnet.ControlNet:
    """Load a ControlNet in LDM's names."""
    if _is_known_to_host(state_dict, sizes):
        return comfy.controlnet.load_controlnet_state_dict(state_dict)
    management = comfy.model_management
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=comfy.supported_models.SD15.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )
    load_device = management.get_torch_device()
    manual_cast = management.unet_manual_cast(dtype, load_device)
    network = comfy.cldm.cldm.ControlNet(
        **sizes,
        dtype=dtype,
        device=management.unet_offload_device(),
        operations=comfy.ops.pick_operations(dtype, manual_cast),
    )
    network.load_state_dict(state_dict)
    return comfy.controlnet.ControlNet(network, load_device=load_device, manual_cast_dtype=manual_cast)


def _is_known_to_host(state_dict: dict[str, Tensor], sizes: Mapping[str, Any]) -> bool:
    """Return whether the host's own loaders read the same sizes off the weights, and know an SD1.5 by them."""
    if sizes["num_heads"] != SD15_HEADS or not comfy.supported_models.SD15.matches(sizes):
        return False
    found = comfy.model_detection.detect_unet_config(state_dict, "")
    return all(sizes[name] == found[name] for name in sizes.keys() & found.keys())


def _attention_heads(config: Mapping[str, Any]) -> int:
    """Return a U-Net's number of heads, which diffusers' configs call ``attention_head_dim`` for SD1.5."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or SD15_HEADS
    return heads[0] if isinstance(heads, list) else heads


@contextmanager
def naming(component: Component) -> Iterator[None]:
    """Name the file in errors about a component's weights.

    Args:
        component: Component that is loaded inside.

    Raises:
        CheckpointError: Tensors are missing or unknown, or do not fit the component's config.
    """
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{component.path}: {error}") from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):  # of which out-of-memory is one
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{component.path} does not fit its own config ({reason}): download both again."
        ) from error
