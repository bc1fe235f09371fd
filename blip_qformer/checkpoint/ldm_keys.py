"""Translate Stable Diffusion's networks from diffusers' keys into LDM's, as a stock checkpoint file has them.

The two layouts hold the same tensors under other keys (LDM: github.com/CompVis/latent-diffusion). diffusers names a
block by what it is (``down_blocks.1.resnets.0``), LDM by when it runs: ``input_blocks.4`` is the fifth step on the way
down. So the names of small modules are plain tables here, and a walk through the levels does LDM's counting.

The structure is read off the state dict itself, so the same code serves SD1.5 and a small model. Nothing is copied: a
translated tensor is the given tensor, or a view of it with two axes of length one appended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .key_map import format_keys
from .module_tree import count_children, has_module, without_text_model_prefix

UNET_PREFIX = "model.diffusion_model."
TEXT_ENCODER_PREFIX = "cond_stage_model."
VAE_PREFIX = "first_stage_model."


# Each table: module name in diffusers -> module name in LDM. A module's `weight` and `bias` keep their names.
# A number in LDM's name is an index into a sequence that also holds activations, which have no tensors.
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


# These modules have the same name in both layouts.
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
OPTIONAL = ("skip_connection", "nin_shortcut")

# Every other module has a bias.
WITHOUT_BIAS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "token_embedding", "position_embedding",
)  # fmt: skip


def stable_diffusion_checkpoint(
    unet: Mapping[str, Tensor], text_encoder: Mapping[str, Tensor], vae: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state dict of an SD1.5 checkpoint file, in the keys that the stock CheckpointLoaderSimple reads.

    Args:
        unet: The U-Net's weights, in diffusers' keys.
        text_encoder: The CLIP text model's weights, in transformers' keys.
        vae: The VAE's weights, in diffusers' keys.

    Returns:
        The same tensors, or views of them.

    Raises:
        ValueError: A network is not of Stable Diffusion 1.5's kind; the tensors are named.
    """
    networks = {
        UNET_PREFIX: unet_to_ldm(unet),
        TEXT_ENCODER_PREFIX: text_encoder_to_ldm(text_encoder),
        VAE_PREFIX: vae_to_ldm(vae),
    }
    return {prefix + key: tensor for prefix, network in networks.items() for key, tensor in network.items()}


def unet_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a U-Net into LDM's keys, without prefix: ``conv_in.weight`` -> ``input_blocks.0.0.weight``.

    Raises:
        ValueError: A tensor is unknown or missing; it is named.
    """
    return _translate(state_dict, _unet_modules(state_dict), "U-Net")


def vae_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a VAE into LDM's keys, without prefix: ``encoder.mid_block.resnets.0.`` -> ``encoder.mid.block_1.``.

    LDM's attention projects with 1x1 convolutions where diffusers has linear layers: [C, C] becomes [C, C, 1, 1].

    Raises:
        ValueError: A tensor is unknown or missing; it is named.
    """
    translated = _translate(state_dict, _vae_modules(state_dict), "VAE")
    for half in ("encoder", "decoder"):
        for projection in ("q", "k", "v", "proj_out"):
            key = f"{half}.mid.attn_1.{projection}.weight"
            if translated[key].ndim == 2:
                translated[key] = translated[key][:, :, None, None]
    return translated


def controlnet_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a ControlNet into LDM's keys: a U-Net's down and middle blocks, the hint's encoder, zero convolutions.

    Raises:
        ValueError: A tensor is unknown or missing; it is named.
    """
    return _translate(state_dict, _controlnet_modules(state_dict), "ControlNet")


def text_encoder_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a CLIP text model into LDM's keys: ``text_model.x`` or ``x`` -> ``transformer.text_model.x``.

    Raises:
        ValueError: A tensor is unknown or missing; it is named.
    """
    inner = without_text_model_prefix(state_dict)
    modules = [*TEXT_ENDS]
    for layer in range(count_children(inner, "encoder.layers")):
        modules += [f"encoder.layers.{layer}.{module}" for module in TEXT_LAYER]
    return _translate(inner, {module: f"transformer.text_model.{module}" for module in modules}, "text encoder")


#: Component of a checkpoint -> its translation.
CONVERSIONS = {
    "unet": unet_to_ldm,
    "text_encoder": text_encoder_to_ldm,
    "vae": vae_to_ldm,
    "controlnet": controlnet_to_ldm,
}


def network_to_ldm(name: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Check a network against its config and translate it into LDM's keys: nothing may be missing, on any level.

    Args:
        name: ``unet``, ``controlnet``, ``vae`` or ``text_encoder``.
        state_dict: The weights, in diffusers' keys.
        config: The content of the network's ``config.json``; empty if there is none.

    Raises:
        ValueError: Levels, layers or tensors are missing or unknown.
    """
    check_depth(name, state_dict, config)
    return CONVERSIONS[name](state_dict)


def check_depth(name: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse weights that lack whole levels or layers, which no key tells: their config says how many there are.

    Args:
        name: ``unet``, ``controlnet``, ``vae`` or ``text_encoder``.
        state_dict: The weights, in diffusers' keys.
        config: The content of the network's ``config.json``. Numbers that it does not have are not checked.

    Raises:
        ValueError: The numbers differ.
    """
    inner = without_text_model_prefix(state_dict)
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block")
    levels = None if widths is None else len(widths)
    first_level = layers[0] if isinstance(layers, list | tuple) else layers
    expected = {
        "unet": {"down_blocks": levels, "up_blocks": levels, "down_blocks.0.resnets": first_level},
        "controlnet": {"down_blocks": levels, "down_blocks.0.resnets": first_level},
        "vae": {"encoder.down_blocks": levels, "decoder.up_blocks": levels, "encoder.down_blocks.0.resnets": layers},
        "text_encoder": {"encoder.layers": config.get("num_hidden_layers")},
    }[name]
    for module, count in expected.items():
        found = count_children(inner, module)
        if count is not None and found != count:
            raise ValueError(
                f"The {name.replace('_', ' ')} holds {found} {module} and its config tells of {count}: download its "
                "file again."
            )


def _unet_modules(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each U-Net module from its name in diffusers to its name in LDM."""
    names = _down_and_middle_modules(state_dict) | UNET_END

    # Up: one block for a resnet, its attention and, at the end of a level, the upsampling.
    block = 0
    for level in range(count_children(state_dict, "up_blocks")):
        up = f"up_blocks.{level}"
        for layer in range(count_children(state_dict, f"{up}.resnets")):
            names |= _under(f"{up}.resnets.{layer}", f"output_blocks.{block}.0", UNET_RESNET)
            names |= _attention(state_dict, f"{up}.attentions.{layer}", f"output_blocks.{block}.1")
            block += 1
        if has_module(state_dict, f"{up}.upsamplers.0"):
            index = 2 if has_module(state_dict, f"{up}.attentions") else 1
            names[f"{up}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{index}.conv"
    return names


def _controlnet_modules(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each ControlNet module from its name in diffusers to its name in LDM."""
    names = _down_and_middle_modules(state_dict)

    # The hint's encoder: convolutions, with an activation between each two.
    hint = "controlnet_cond_embedding"
    hidden = [f"{hint}.blocks.{block}" for block in range(count_children(state_dict, f"{hint}.blocks"))]
    for index, convolution in enumerate([f"{hint}.conv_in", *hidden, f"{hint}.conv_out"]):
        names[convolution] = f"input_hint_block.{2 * index}"

    for block in range(count_children(state_dict, "controlnet_down_blocks")):
        names[f"controlnet_down_blocks.{block}"] = f"zero_convs.{block}.0"
    return names | {"controlnet_mid_block": "middle_block_out.0"}


def _down_and_middle_modules(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the modules that a U-Net and a ControlNet have in common: down blocks and middle block."""
    names = dict(UNET_BEGINNING)

    # Down: one block for a resnet and its attention, one for each downsampling. Block 0 is the first convolution.
    block = 1
    for level in range(count_children(state_dict, "down_blocks")):
        down = f"down_blocks.{level}"
        for layer in range(count_children(state_dict, f"{down}.resnets")):
            names |= _under(f"{down}.resnets.{layer}", f"input_blocks.{block}.0", UNET_RESNET)
            names |= _attention(state_dict, f"{down}.attentions.{layer}", f"input_blocks.{block}.1")
            block += 1
        if has_module(state_dict, f"{down}.downsamplers.0"):
            names[f"{down}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1

    # Middle: resnet, attention, resnet, as one block.
    names |= _under("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    names |= _attention(state_dict, "mid_block.attentions.0", "middle_block.1")
    names |= _under("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    return names


def _attention(state_dict: Mapping[str, Tensor], module: str, ldm_module: str) -> dict[str, str]:
    """Map the modules of one of the U-Net's attentions, with all its transformer blocks; empty if there is none."""
    if not has_module(state_dict, module):
        return {}
    modules = [*UNET_ATTENTION]
    for block in range(count_children(state_dict, f"{module}.transformer_blocks")):
        modules += [f"transformer_blocks.{block}.{name}" for name in UNET_TRANSFORMER_BLOCK]
    return _under(module, ldm_module, {name: name for name in modules})


def _vae_modules(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each VAE module from its name in diffusers to its name in LDM."""
    names = dict(VAE_ENDS)
    for half in ("encoder", "decoder"):
        names |= _under(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", VAE_RESNET)
        names |= _under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION_BEFORE_0_18)
        names |= _under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        names |= _under(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", VAE_RESNET)

    for level in range(count_children(state_dict, "encoder.down_blocks")):
        down = f"encoder.down_blocks.{level}"
        for layer in range(count_children(state_dict, f"{down}.resnets")):
            names |= _under(f"{down}.resnets.{layer}", f"encoder.down.{level}.block.{layer}", VAE_RESNET)
        if has_module(state_dict, f"{down}.downsamplers.0"):
            names[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"

    # LDM numbers the decoder's levels by resolution, as the encoder's: the one that runs first has the highest number.
    levels = count_children(state_dict, "decoder.up_blocks")
    for level in range(levels):
        up, ldm_level = f"decoder.up_blocks.{level}", levels - 1 - level
        for layer in range(count_children(state_dict, f"{up}.resnets")):
            names |= _under(f"{up}.resnets.{layer}", f"decoder.up.{ldm_level}.block.{layer}", VAE_RESNET)
        if has_module(state_dict, f"{up}.upsamplers.0"):
            names[f"{up}.upsamplers.0.conv"] = f"decoder.up.{ldm_level}.upsample.conv"
    return names


def _translate(state_dict: Mapping[str, Tensor], modules: Mapping[str, str], network: str) -> dict[str, Tensor]:
    """Return the same tensors in LDM's keys; ValueError if one is unknown or missing.

    Args:
        state_dict: Tensors in diffusers' keys.
        modules: The name of each module in diffusers -> its name in LDM.
        network: What the network is called in the error message.
    """
    translated, unknown = {}, []
    for key, tensor in state_dict.items():
        module, _, parameter = key.rpartition(".")
        if parameter == "position_ids":
            continue  # 0, 1, 2, ... up to the longest text: no weight, only stored by older transformers
        if module in modules and parameter in ("weight", "bias"):
            translated[f"{modules[module]}.{parameter}"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"The {network} holds tensors that Stable Diffusion 1.5 has no place for ({format_keys(unknown)}): "
            "use weights of that architecture, in diffusers' names."
        )
    missing: dict[str, str] = {}  # by LDM's key, as one LDM module may have an old and a new name in diffusers
    for module, ldm_module in modules.items():
        parameters = ("weight",) if ldm_module.endswith(WITHOUT_BIAS) else ("weight", "bias")
        absent = [parameter for parameter in parameters if f"{ldm_module}.{parameter}" not in translated]
        if not (ldm_module.endswith(OPTIONAL) and len(absent) == len(parameters)):
            missing |= {f"{ldm_module}.{parameter}": f"{module}.{parameter}" for parameter in absent}
    if missing:
        raise ValueError(f"The {network} lacks tensors ({format_keys(missing.values())}): download its file again.")
    return translated


def _under(module: str, ldm_module: str, table: Mapping[str, str]) -> dict[str, str]:
    """Move both sides of a table below a parent: {"norm1": "in_layers.0"} -> {"a.norm1": "b.in_layers.0"}."""
    return {f"{module}.{name}": f"{ldm_module}.{ldm_name}" for name, ldm_name in table.items()}
