"""Stable Diffusion 1.5's original (LDM) checkpoint layout, written from the published diffusers layout.

The two layouts hold the same tensors under other names. diffusers names a block by what it is
(`down_blocks.1.resnets.0`), LDM by when it runs: `input_blocks.4` is the fifth step on the way down. So the names of
small modules are plain tables here, and a walk through the levels does LDM's counting.

Everything is read off the weights themselves (how many levels, how many resnets in each, which have attention, how
wide), so the same code serves the full model and a toy one. Nothing is copied: a converted tensor is the given tensor,
or a view of it with two axes of length one appended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def unet_config(weights: Mapping[str, Tensor], heads: int = 8) -> dict:
    """The arguments with which ComfyUI's UNetModel builds a U-Net of this size.

    Args:
        weights: in diffusers' names.
        heads: of every attention; no shape tells their number, SD1.5 has 8.

    Returns:
        A plain dict, with no dtype and device in it: those are the host's to choose.

    Raises:
        ValueError: a tensor that tells a size is missing.
    """
    levels = range(count_children(weights, "up_blocks"))
    depth_up = [depth for level in levels for depth in transformer_depths(weights, f"up_blocks.{level}")]
    return {
        **_way_down_config(weights, heads),
        "out_channels": shape_of(weights, "conv_out.weight")[0],
        "transformer_depth_output": depth_up[::-1],  # the host takes them from the end of the list
    }


def controlnet_config(weights: Mapping[str, Tensor], heads: int = 8) -> dict:
    """The arguments with which ComfyUI's ControlNet builds a ControlNet of this size; see `unet_config`."""
    hint_channels = shape_of(weights, "controlnet_cond_embedding.conv_in.weight")[1]
    return {**_way_down_config(weights, heads), "hint_channels": hint_channels}


def _way_down_config(weights: Mapping[str, Tensor], heads: int) -> dict:
    """What a U-Net and a ControlNet have in common: everything up to the middle."""
    width = shape_of(weights, "conv_in.weight")[0]
    levels = range(count_children(weights, "down_blocks"))
    widths = [shape_of(weights, f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in levels]
    depth_down = [depth for level in levels for depth in transformer_depths(weights, f"down_blocks.{level}")]
    middle = "mid_block.attentions.0"
    return {
        "image_size": 32,
        "in_channels": shape_of(weights, "conv_in.weight")[1],
        "model_channels": width,
        "channel_mult": _multiples(widths, width),
        "num_res_blocks": [count_children(weights, f"down_blocks.{level}.resnets") for level in levels],
        "num_heads": heads,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": len(shape_of(weights, f"{middle}.proj_in.weight")) == 2,
        "context_dim": shape_of(weights, f"{middle}.transformer_blocks.0.attn2.to_k.weight")[1],
        "transformer_depth": depth_down,
        "transformer_depth_middle": count_children(weights, f"{middle}.transformer_blocks"),
        "adm_in_channels": None,
        "legacy": False,
        "use_checkpoint": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def vae_config(weights: Mapping[str, Tensor]) -> dict:
    """The arguments with which ComfyUI's AutoencoderKL builds a VAE of this size: `ddconfig` and `embed_dim`.

    Args:
        weights: in diffusers' names.

    Raises:
        ValueError: a tensor that tells a size is missing.
    """
    width, image_channels = shape_of(weights, "encoder.conv_in.weight")[:2]
    latent_channels = shape_of(weights, "decoder.conv_in.weight")[1]
    levels = range(count_children(weights, "encoder.down_blocks"))
    widths = [shape_of(weights, f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in levels]
    return {
        "ddconfig": {
            "double_z": shape_of(weights, "encoder.conv_out.weight")[0] == 2 * latent_channels,
            "z_channels": latent_channels,
            "resolution": 256,
            "in_channels": image_channels,
            "out_ch": shape_of(weights, "decoder.conv_out.weight")[0],
            "ch": width,
            "ch_mult": _multiples(widths, width),
            "num_res_blocks": count_children(weights, "encoder.down_blocks.0.resnets"),
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "embed_dim": shape_of(weights, "post_quant_conv.weight")[1],
    }


class Multiple(float):
    """How many times as wide as the first level another one is, where that is no whole number: its product is one.

    ComfyUI's networks are told multiples and never widths.
    """

    def __mul__(self, width: int) -> int:
        return round(float(self) * width)

    __rmul__ = __mul__


def _multiples(widths: Iterable[int], first: int) -> list[int | Multiple]:
    return [Multiple(width / first) if width % first else width // first for width in widths]


def text_encoder_config(weights: Mapping[str, Tensor], heads: int | None = None) -> dict:
    """The size of a CLIP text model, in the words of ComfyUI's `clip_l_model_config`.

    Args:
        weights: with or without `text_model.` before their names.
        heads: of every attention; if not told, they are 64 wide, as CLIP's.

    Raises:
        ValueError: a tensor that tells a size is missing.
    """
    plain = without_text_model_prefix(weights)
    vocabulary, width = shape_of(plain, "embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(plain, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count_children(plain, "encoder.layers"),
        "num_attention_heads": heads or max(1, width // 64),
        "max_position_embeddings": shape_of(plain, "embeddings.position_embedding.weight")[0],
        "hidden_act": "quick_gelu",
    }


def check_depth(part: str, weights: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Refuse weights that lack whole levels or layers, which no name tells: their config says how many there are.

    Args:
        part: "unet", "controlnet", "vae" or "text_encoder".
        weights: in diffusers' names; ``config``: what its ``config.json`` holds, as far as there is one.

    Raises:
        ValueError: the numbers differ. A config that does not tell them is trusted.
    """
    plain = without_text_model_prefix(weights)
    levels = len(config["block_out_channels"]) if "block_out_channels" in config else None
    expected = {
        "unet": {"down_blocks": levels, "up_blocks": levels},
        "controlnet": {"down_blocks": levels},
        "vae": {"encoder.down_blocks": levels, "decoder.up_blocks": levels},
        "text_encoder": {"encoder.layers": config.get("num_hidden_layers")},
    }[part]
    for module, count in expected.items():
        found = count_children(plain, module)
        if count is not None and found != count:
            raise ValueError(
                f"The {part.replace('_', ' ')} holds {found} {module} and its config tells of {count}: download its "
                "file again."
            )


def departures_from_stock(
    unet: Mapping[str, Tensor], text_encoder: Mapping[str, Tensor], vae: Mapping[str, Tensor]
) -> list[str]:
    """What is not as in Stable Diffusion 1.5, in words, and so keeps the stock CheckpointLoaderSimple from loading it.

    That loader knows the model by these numbers, and builds VAE and text encoder of its own sizes. Empty for a model
    it loads.

    Args:
        unet, text_encoder, vae: the weights in diffusers' names.
    """
    image, text, decoder = unet_config(unet), text_encoder_config(text_encoder), vae_config(vae)["ddconfig"]
    found_and_stock = {
        "U-Net width": (image["model_channels"], 320),
        "U-Net context": (image["context_dim"], 768),
        "U-Net projections": ("linear" if image["use_linear_in_transformer"] else "convolutions", "convolutions"),
        "text encoder width": (text["hidden_size"], 768),
        "text encoder layers": (text["num_hidden_layers"], 12),
        "VAE width": (decoder["ch"], 128),
        "VAE levels": (decoder["ch_mult"], [1, 2, 4, 4]),
        "VAE resnets in a level": (decoder["num_res_blocks"], 2),
    }
    return [f"{what} {found} instead of {stock}" for what, (found, stock) in found_and_stock.items() if found != stock]


def transformer_depths(weights: Mapping[str, Tensor], level: str) -> list[int]:
    """For each resnet of a U-Net level, how many transformer blocks follow it: 0 where there is no attention."""
    return [
        count_children(weights, f"{level}.attentions.{layer}.transformer_blocks")
        for layer in range(count_children(weights, f"{level}.resnets"))
    ]


def without_text_model_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's text model by the names inside it; newer libraries save it so, without the leading `text_model.`."""
    return {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def count_children(names: Iterable[str], parent: str) -> int:
    """How many children `parent.0`, `parent.1`, ... there are."""
    count = 0
    while has_module(names, f"{parent}.{count}"):
        count += 1
    return count


def has_module(names: Iterable[str], module: str) -> bool:
    """Whether any tensor lies in that module."""
    return any(name.startswith(f"{module}.") for name in names)


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of one tensor; ValueError if it is not there."""
    if name not in weights:
        raise ValueError(f"The weights hold no {name}, which tells the model's size: use weights in diffusers' names.")
    return tuple(weights[name].shape)
