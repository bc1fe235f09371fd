"""The networks of a checkpoint in the keys of the files that stock ComfyUI loads, and the names of those files."""

from __future__ import annotations

from torch import Tensor

from .components import Component
from .ldm_config import departures_from_stock
from .ldm_keys import check_depth, network_to_ldm, stable_diffusion_checkpoint
from .open import Checkpoint

CHECKPOINT_NAME = "blip_diffusion_sd15.safetensors"  # for CheckpointLoaderSimple
QFORMER_NAME = "blip2_qformer.safetensors"
CONTROLNET_NAME = "blip_diffusion_controlnet.safetensors"  # for ControlNetLoader

#: What the published folders are called among the models; the workflows name them so.
MODEL_FOLDER, CONTROLNET_FOLDER = "blipdiffusion", "blipdiffusion-controlnet"

STABLE_DIFFUSION = ("unet", "text_encoder", "vae")


def stable_diffusion_weights(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict for the stock loader and what will keep it from loading; both empty for a Q-Former alone.

    Args:
        checkpoint: An opened checkpoint.

    Raises:
        CheckpointError: Some of the three networks are missing, or a file that may hold one cannot be read.
    """
    if not checkpoint.problems and not any(getattr(checkpoint, name) for name in STABLE_DIFFUSION):
        return {}, []
    components = {name: checkpoint.require(name) for name in STABLE_DIFFUSION}
    state_dicts = {name: component.weights() for name, component in components.items()}
    for name, component in components.items():
        check_depth(name, state_dicts[name], component.config)
    unet, text_encoder, vae = state_dicts.values()
    return stable_diffusion_checkpoint(unet, text_encoder, vae), departures_from_stock(unet, text_encoder, vae)


def controlnet_weights(controlnet: Component | None) -> dict[str, Tensor]:
    """Return the state dict for the stock ControlNetLoader; empty if there is no ControlNet.

    Args:
        controlnet: The ControlNet of a checkpoint.

    Raises:
        CheckpointError: It cannot be read, or tensors are missing or unknown.
    """
    if controlnet is None:
        return {}
    return network_to_ldm("controlnet", controlnet.weights(), controlnet.config)
