"""Stable Diffusion 1.5's original (LDM) checkpoint layout, written from the published diffusers layout.

The two layouts hold the same tensors under other names. diffusers names a block by what it is
(`down_blocks.1.resnets.0`), LDM by when it runs: `input_blocks.4` is the fifth step on the way down. So the names of
small modules are plain tables here, and a walk through the levels does LDM's counting.

Everything is read off the weights themselves (how many levels, how many resnets in each, which have attention, how
wide), so the same code serves the full model and a toy one. Nothing is copied: a converted tensor is the given tensor,
or a view of it with two axes of length one appended.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .key_map import listed
from .ldm_config import check_depth, count_children, has_module, without_text_model_prefix

UNET_PREFIX = "model.diffusion_model."


TEXT_ENCODER_PREFIX = "cond_stage_model."


VAE_PREFIX = "first_stage_model."


# Each table: module name in diffusers -> module name in LDM. A module's `weight` and `bias` keep their names.
# Where LDM shows a number, it counts the places of a sequence that also holds activations: those have no tensors.
UNET_BEGINNING = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
}


UNET_END = {"conv_norm_out": "out.0", "conv_out": "out.2"}


UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
}


VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}


# diffusers renamed these four in version 0.18; published files hold either set.
VAE_ATTENTION_BEFORE_0_18 = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


# These parts are called the same in both layouts.
UNET_ATTENTION = ("norm", "proj_in", "proj_out")


UNET_TRANSFORMER_BLOCK = (
    "norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "norm3", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip


TEXT_ENDS = ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")


TEXT_LAYER = (
    "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "layer_norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


# A resnet has a shortcut only where it changes the number of channels.
SOMETIMES_ABSENT = ("skip_connection", "nin_shortcut")


# Every other module has a bias.
WITHOUT_BIAS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v")


WITHOUT_BIAS += ("token_embedding", "position_embedding")


def stable_diffusion_checkpoint(
    unet: Mapping[str, Tensor], text_encoder: Mapping[str, Tensor], vae: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Everything a stock SD1.5 checkpoint file holds, under the names the stock CheckpointLoaderSimple reads.

    Args:
        unet, text_encoder, vae: the weights of the three parts, in diffusers' names.

    Returns:
        One state dict, of the same tensors or views of them.

    Raises:
        ValueError: a part is not of Stable Diffusion 1.5's kind; the tensors are named.
    """
    parts = {
        UNET_PREFIX: unet_to_ldm(unet),
        TEXT_ENCODER_PREFIX: text_encoder_to_ldm(text_encoder),
        VAE_PREFIX: vae_to_ldm(vae),
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def unet_to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's weights under LDM's names, without prefix: `conv_in.weight` -> `input_blocks.0.0.weight`.

    Raises:
        ValueError: a tensor is unknown or missing; it is named.
    """
    return _renamed(weights, _unet_modules(weights), part="U-Net")


def vae_to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's weights under LDM's names, without prefix: `encoder.mid_block.resnets.0.` -> `encoder.mid.block_1.`.

    LDM's attention projects with 1x1 convolutions where diffusers has linear layers: [C, C] becomes [C, C, 1, 1].

    Raises:
        ValueError: a tensor is unknown or missing; it is named.
    """
    renamed = _renamed(weights, _vae_modules(weights), part="VAE")
    for half in ("encoder", "decoder"):
        for projection in ("q", "k", "v", "proj_out"):
            name = f"{half}.mid.attn_1.{projection}.weight"
            if renamed[name].ndim == 2:
                renamed[name] = renamed[name][:, :, None, None]
    return renamed


def controlnet_to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet's weights under LDM's names: a U-Net's way down, a picture's way in, and convolutions to the way up.

    Raises:
        ValueError: a tensor is unknown or missing; it is named.
    """
    return _renamed(weights, _controlnet_modules(weights), part="ControlNet")


def text_encoder_to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text model's weights under LDM's names: `text_model.x` or plain `x` -> `transformer.text_model.x`.

    Raises:
        ValueError: a tensor is unknown or missing; it is named.
    """
    plain = without_text_model_prefix(weights)
    modules = [*TEXT_ENDS]
    for layer in range(count_children(plain, "encoder.layers")):
        modules += [f"encoder.layers.{layer}.{module}" for module in TEXT_LAYER]
    return _renamed(plain, {module: f"transformer.text_model.{module}" for module in modules}, part="text encoder")


#: Component of a checkpoint -> what converts it.
CONVERSIONS = {
    "unet": unet_to_ldm,
    "text_encoder": text_encoder_to_ldm,
    "vae": vae_to_ldm,
    "controlnet": controlnet_to_ldm,
}


def network_to_ldm(part: str, weights: Mapping[str, Tensor], config: Mapping[str, object]) -> dict[str, Tensor]:
    """A network's weights under LDM's names, held against its config first: nothing may be missing, on any level.

    Args:
        part, weights, config: as for `check_depth`.

    Raises:
        ValueError: levels, layers or tensors are missing, or unknown.
    """
    check_depth(part, weights, config)
    return CONVERSIONS[part](weights)


def _unet_modules(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each U-Net module in LDM, by its name in diffusers."""
    names = _way_down_modules(weights) | UNET_END

    # Up: one block for a resnet, its attention, and, at the end of a level, the doubling.
    block = 0
    for level in range(count_children(weights, "up_blocks")):
        up = f"up_blocks.{level}"
        for layer in range(count_children(weights, f"{up}.resnets")):
            names |= _under(f"{up}.resnets.{layer}", f"output_blocks.{block}.0", UNET_RESNET)
            names |= _attention(weights, f"{up}.attentions.{layer}", f"output_blocks.{block}.1")
            block += 1
        if has_module(weights, f"{up}.upsamplers.0"):
            place = 2 if has_module(weights, f"{up}.attentions") else 1
            names[f"{up}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{place}.conv"
    return names


def _controlnet_modules(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each ControlNet module in LDM, by its name in diffusers."""
    names = _way_down_modules(weights)

    # The picture's way in: convolutions, with an activation between each two.
    picture = "controlnet_cond_embedding"
    hidden = [f"{picture}.blocks.{block}" for block in range(count_children(weights, f"{picture}.blocks"))]
    for place, convolution in enumerate([f"{picture}.conv_in", *hidden, f"{picture}.conv_out"]):
        names[convolution] = f"input_hint_block.{2 * place}"

    for block in range(count_children(weights, "controlnet_down_blocks")):
        names[f"controlnet_down_blocks.{block}"] = f"zero_convs.{block}.0"
    return names | {"controlnet_mid_block": "middle_block_out.0"}


def _way_down_modules(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """What a U-Net and a ControlNet have in common: everything up to the middle."""
    names = dict(UNET_BEGINNING)

    # Down: one block for a resnet and its attention, and one for each halving. Block 0 is the first convolution.
    block = 1
    for level in range(count_children(weights, "down_blocks")):
        down = f"down_blocks.{level}"
        for layer in range(count_children(weights, f"{down}.resnets")):
            names |= _under(f"{down}.resnets.{layer}", f"input_blocks.{block}.0", UNET_RESNET)
            names |= _attention(weights, f"{down}.attentions.{layer}", f"input_blocks.{block}.1")
            block += 1
        if has_module(weights, f"{down}.downsamplers.0"):
            names[f"{down}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1

    # Middle: resnet, attention, resnet, as one block.
    names |= _under("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    names |= _attention(weights, "mid_block.attentions.0", "middle_block.1")
    names |= _under("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    return names


def _attention(weights: Mapping[str, Tensor], ours: str, ldm: str) -> dict[str, str]:
    """The modules of one of the U-Net's attentions, with however many transformer blocks; none where there is none."""
    if not has_module(weights, ours):
        return {}
    modules = [*UNET_ATTENTION]
    for block in range(count_children(weights, f"{ours}.transformer_blocks")):
        modules += [f"transformer_blocks.{block}.{module}" for module in UNET_TRANSFORMER_BLOCK]
    return _under(ours, ldm, {module: module for module in modules})


def _vae_modules(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each VAE module in LDM, by its name in diffusers."""
    names = dict(VAE_ENDS)
    for half in ("encoder", "decoder"):
        names |= _under(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", VAE_RESNET)
        names |= _under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION_BEFORE_0_18)
        names |= _under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        names |= _under(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", VAE_RESNET)

    for level in range(count_children(weights, "encoder.down_blocks")):
        down = f"encoder.down_blocks.{level}"
        for layer in range(count_children(weights, f"{down}.resnets")):
            names |= _under(f"{down}.resnets.{layer}", f"encoder.down.{level}.block.{layer}", VAE_RESNET)
        if has_module(weights, f"{down}.downsamplers.0"):
            names[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"

    # LDM numbers the decoder's levels by resolution, as the encoder's: the one that runs first has the highest number.
    levels = count_children(weights, "decoder.up_blocks")
    for level in range(levels):
        up, ldm_level = f"decoder.up_blocks.{level}", levels - 1 - level
        for layer in range(count_children(weights, f"{up}.resnets")):
            names |= _under(f"{up}.resnets.{layer}", f"decoder.up.{ldm_level}.block.{layer}", VAE_RESNET)
        if has_module(weights, f"{up}.upsamplers.0"):
            names[f"{up}.upsamplers.0.conv"] = f"decoder.up.{ldm_level}.upsample.conv"
    return names


def _renamed(weights: Mapping[str, Tensor], modules: Mapping[str, str], part: str) -> dict[str, Tensor]:
    """The same tensors under the other layout's names; ValueError if one has no place there, or a place stays empty."""
    renamed, unknown = {}, []
    for name, tensor in weights.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "position_ids":
            continue  # 0, 1, 2, ... up to the longest text: no weight, only stored by older transformers
        if module in modules and parameter in ("weight", "bias"):
            renamed[f"{modules[module]}.{parameter}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"The {part} holds tensors that Stable Diffusion 1.5 has no place for ({listed(unknown)}): "
            "use weights of that architecture, in diffusers' names."
        )
    missing: dict[str, str] = {}  # by LDM's name, as one place may have an old and a new name
    for ours, ldm in modules.items():
        parameters = ("weight",) if ldm.endswith(WITHOUT_BIAS) else ("weight", "bias")
        absent = [parameter for parameter in parameters if f"{ldm}.{parameter}" not in renamed]
        if not (ldm.endswith(SOMETIMES_ABSENT) and len(absent) == len(parameters)):
            missing |= {f"{ldm}.{parameter}": f"{ours}.{parameter}" for parameter in absent}
    if missing:
        raise ValueError(f"The {part} lacks tensors ({listed([*missing.values()])}): download its file again.")
    return renamed


def _under(ours: str, ldm: str, table: Mapping[str, str]) -> dict[str, str]:
    """The table with both its sides moved below a parent: {"norm1": "in_layers.0"} -> {"a.norm1": "b.in_layers.0"}."""
    return {f"{ours}.{name}": f"{ldm}.{ldm_name}" for name, ldm_name in table.items()}
