"""The layout of the Hub (``Salesforce/blipdiffusion``, folder ``qformer/``): keys and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...encoder import SubjectEncoderConfig
from ...plain_data import shown
from ..infer_config import config_from_shapes
from ..key_map import KeyMap, projection_keys, qformer_keys
from ..read_tensors import CheckpointError

_VISION = "visual_encoder"
_LAYER = "visual_encoder.encoder.layers.{}"

KEY_MAP = KeyMap(
    {
        "query_tokens": "qformer.query_tokens",
        **qformer_keys(prefix="", attention="attention"),
        **projection_keys(prefix="proj_layer."),
        f"{_VISION}.embeddings.class_embedding": "vision.class_embedding",
        f"{_VISION}.embeddings.patch_embedding": "vision.patch_embedding",
        f"{_VISION}.embeddings.position_embedding": "vision.position_embedding",
        f"{_VISION}.pre_layernorm": "vision.pre_norm",
        f"{_VISION}.post_layernorm": "vision.post_norm",
        f"{_LAYER}.layer_norm1": "vision.blocks.{}.attention_norm",
        f"{_LAYER}.self_attn.qkv": "vision.blocks.{}.attention.query_key_value",
        f"{_LAYER}.self_attn.projection": "vision.blocks.{}.attention.output",
        f"{_LAYER}.layer_norm2": "vision.blocks.{}.feed_forward_norm",
        f"{_LAYER}.mlp.fc1": "vision.blocks.{}.expand",
        f"{_LAYER}.mlp.fc2": "vision.blocks.{}.contract",
    }
)

# A published config may leave out what equals the defaults of transformers' Blip2VisionConfig and Blip2QFormerConfig.
_VISION_DEFAULTS = {"num_attention_heads": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
_QFORMER_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}

_FIELDS = {
    "num_attention_heads": "heads",
    "layer_norm_eps": "layer_norm_eps",
    "num_hidden_layers": "layers",
    "cross_attention_frequency": "cross_attention_frequency",
}


def config_from_hub(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> SubjectEncoderConfig:
    """Return the encoder's configuration.

    Shapes tell most sizes; the config file tells heads, epsilons and how many layers there must be.

    Args:
        state_dict: The weights, in the encoder's keys.
        config: The content of ``config.json``, full or short; empty for a file without one, which is taken to be of
            the published model's kind.
        path: The file, for the error message.

    Raises:
        CheckpointError: The config asks for an activation that this encoder does not have.
    """
    if not config.keys() & {"vision_config", "qformer_config"}:
        return config_from_shapes(state_dict, {}, {}, path)
    vision = _VISION_DEFAULTS | _group(config, "vision_config", path)
    qformer = _QFORMER_DEFAULTS | _group(config, "qformer_config", path)
    for name, values, needed in (("vision", vision, "quick_gelu"), ("qformer", qformer, "gelu")):
        if values["hidden_act"] != needed:
            raise CheckpointError(
                f"{path}: its config gives the {name} part the activation {shown(values['hidden_act'])}, but "
                f'BLIP-Diffusion has "{needed}": use the published config.json.'
            )
    return config_from_shapes(state_dict, _renamed(vision), _renamed(qformer), path)


def _group(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return a group of values of a config file; CheckpointError if it is none."""
    if not isinstance(group := config.get(name, {}), dict):
        raise CheckpointError(f"{path}: its config sets {name} to {shown(group)}, where a group of values is needed.")
    return group


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the encoder's configuration has too, under its names."""
    return {_FIELDS[name]: value for name, value in config.items() if name in _FIELDS}
