"""Infer the configurations with which ComfyUI builds Stable Diffusion's networks, from weights in diffusers' keys.

ComfyUI's networks are LDM's (github.com/CompVis/latent-diffusion), and so are the names of their arguments. Everything
but the number of heads is read off the shapes, so the same code serves SD1.5 and a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .module_tree import count_children, shape_of, without_text_model_prefix


def unet_config(state_dict: Mapping[str, Tensor], heads: int = 8) -> dict[str, Any]:
    """Infer the arguments of ComfyUI's ``UNetModel``.

    Args:
        state_dict: The U-Net's weights, in diffusers' keys.
        heads: The number of heads of every attention, which no shape tells; SD1.5 has 8.

    Returns:
        The arguments, without dtype and device, which the host chooses.

    Raises:
        ValueError: A tensor that tells a size is missing.
    """
    levels = range(count_children(state_dict, "up_blocks"))
    depth_up = [depth for level in levels for depth in transformer_depths(state_dict, f"up_blocks.{level}")]
    return {
        **_down_and_middle_config(state_dict, heads),
        "out_channels": shape_of(state_dict, "conv_out.weight", 4)[0],
        "transformer_depth_output": depth_up[::-1],  # ComfyUI pops from the end of the list
    }


def controlnet_config(state_dict: Mapping[str, Tensor], heads: int = 8) -> dict[str, Any]:
    """Infer the arguments of ComfyUI's ``ControlNet``.

    Args:
        state_dict: The ControlNet's weights, in diffusers' keys.
        heads: The number of heads of every attention.

    Returns:
        The arguments, without dtype and device.

    Raises:
        ValueError: A tensor that tells a size is missing.
    """
    hint_channels = shape_of(state_dict, "controlnet_cond_embedding.conv_in.weight", 4)[1]
    return {**_down_and_middle_config(state_dict, heads), "hint_channels": hint_channels}


def _down_and_middle_config(state_dict: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """Infer what a U-Net and a ControlNet have in common: the down blocks and the middle block."""
    width = shape_of(state_dict, "conv_in.weight", 4)[0]
    levels = range(count_children(state_dict, "down_blocks"))
    widths = [shape_of(state_dict, f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    depth_down = [depth for level in levels for depth in transformer_depths(state_dict, f"down_blocks.{level}")]
    middle = "mid_block.attentions.0"
    return {
        "image_size": 32,
        "in_channels": shape_of(state_dict, "conv_in.weight", 4)[1],
        "model_channels": width,
        "channel_mult": _multiples(widths, width),
        "num_res_blocks": [count_children(state_dict, f"down_blocks.{level}.resnets") for level in levels],
        "num_heads": heads,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": len(shape_of(state_dict, f"{middle}.proj_in.weight", 2, 4)) == 2,
        "context_dim": shape_of(state_dict, f"{middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "transformer_depth": depth_down,
        "transformer_depth_middle": count_children(state_dict, f"{middle}.transformer_blocks"),
        "adm_in_channels": None,
        "legacy": False,
        "use_checkpoint": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def transformer_depths(state_dict: Mapping[str, Tensor], level: str) -> list[int]:
    """Count the transformer blocks behind each resnet of a U-Net level.

    Args:
        state_dict: The weights of a U-Net or ControlNet, in diffusers' keys.
        level: The key of the level, such as ``down_blocks.0``.

    Returns:
        The number behind each resnet; 0 if there is no attention.
    """
    return [
        count_children(state_dict, f"{level}.attentions.{layer}.transformer_blocks")
        for layer in range(count_children(state_dict, f"{level}.resnets"))
    ]


def vae_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the arguments of ComfyUI's ``AutoencoderKL``.

    Args:
        state_dict: The VAE's weights, in diffusers' keys.

    Returns:
        ``ddconfig`` and ``embed_dim``.

    Raises:
        ValueError: A tensor that tells a size is missing.
    """
    width, image_channels = shape_of(state_dict, "encoder.conv_in.weight", 4)[:2]
    latent_channels = shape_of(state_dict, "decoder.conv_in.weight", 4)[1]
    levels = range(count_children(state_dict, "encoder.down_blocks"))
    widths = [shape_of(state_dict, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    return {
        "ddconfig": {
            "double_z": shape_of(state_dict, "encoder.conv_out.weight", 4)[0] == 2 * latent_channels,
            "z_channels": latent_channels,
            "resolution": 256,
            "in_channels": image_channels,
            "out_ch": shape_of(state_dict, "decoder.conv_out.weight", 4)[0],
            "ch": width,
            "ch_mult": _multiples(widths, width),
            "num_res_blocks": count_children(state_dict, "encoder.down_blocks.0.resnets"),
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "embed_dim": shape_of(state_dict, "post_quant_conv.weight", 4)[1],
    }


def text_encoder_config(state_dict: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Infer the configuration of a CLIP text model, as ComfyUI's ``clip_l_model_config`` has it.

    Args:
        state_dict: The weights, their keys with or without ``text_model.``.
        heads: The number of heads of every attention; None makes them 64 wide, as CLIP's are.

    Returns:
        The configuration as a dictionary.

    Raises:
        ValueError: A tensor that tells a size is missing.
    """
    inner = without_text_model_prefix(state_dict)
    vocabulary, width = shape_of(inner, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(inner, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count_children(inner, "encoder.layers"),
        "num_attention_heads": heads or max(1, width // 64),
        "max_position_embeddings": shape_of(inner, "embeddings.position_embedding.weight", 2)[0],
        "hidden_act": "quick_gelu",
    }


def departures_from_stock(
    unet: Mapping[str, Tensor], text_encoder: Mapping[str, Tensor], vae: Mapping[str, Tensor]
) -> list[str]:
    """List what differs from Stable Diffusion 1.5 and so keeps the stock CheckpointLoaderSimple from loading a model.

    That loader recognises the model by these numbers, and builds VAE and text encoder of fixed sizes.

    Args:
        unet: The U-Net's weights, in diffusers' keys.
        text_encoder: The CLIP text model's weights.
        vae: The VAE's weights, in diffusers' keys.

    Returns:
        A phrase for each difference; empty for a model that it loads.

    Raises:
        ValueError: A tensor that tells a size is missing.
    """
    unet_sizes, text_sizes, vae_sizes = (
        unet_config(unet),
        text_encoder_config(text_encoder),
        vae_config(vae)["ddconfig"],
    )
    found_and_stock = {
        "U-Net width": (unet_sizes["model_channels"], 320),
        "U-Net context": (unet_sizes["context_dim"], 768),
        "U-Net projections": ("linear" if unet_sizes["use_linear_in_transformer"] else "convolutions", "convolutions"),
        "text encoder width": (text_sizes["hidden_size"], 768),
        "text encoder layers": (text_sizes["num_hidden_layers"], 12),
        "VAE width": (vae_sizes["ch"], 128),
        "VAE levels": (vae_sizes["ch_mult"], [1, 2, 4, 4]),
        "VAE resnets in a level": (vae_sizes["num_res_blocks"], 2),
    }
    return [f"{what} {found} instead of {stock}" for what, (found, stock) in found_and_stock.items() if found != stock]


class Multiple(float):
    """A ratio of widths that is no whole number; its product with the first level's width is an integer.

    ComfyUI's networks take multiples of the first width and no widths.
    """

    def __mul__(self, width: float) -> int:
        return round(float(self) * width)

    def __rmul__(self, width: float) -> int:
        return self * width


def _multiples(widths: Iterable[int], first: int) -> list[int | Multiple]:
    """Return each level's width as a multiple of the first level's."""
    return [Multiple(width / first) if width % first else width // first for width in widths]
