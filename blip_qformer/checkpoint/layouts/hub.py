"""The Q-Former as the Hub has it (``Salesforce/blipdiffusion``, folder ``qformer/``): names and config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...encoder import SubjectEncoderConfig
from ..infer_config import config_from_shapes
from ..key_map import KeyMap, projection_names, qformer_names
from ..read_tensors import CheckpointError

_VISION = "visual_encoder"


_LAYER = "visual_encoder.encoder.layers.{}"


NAMES = KeyMap(
    {
        "query_tokens": "qformer.query_tokens",
        **qformer_names(prefix="", attention="attention"),
        **projection_names(prefix="proj_layer."),
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


# What a published config may leave out, because it equals transformers' default (REFERENCE: Blip2Config).
_VISION_DEFAULTS = {"num_attention_heads": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}


_QFORMER_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}


_FIELDS = {
    "num_attention_heads": "heads",
    "layer_norm_eps": "layer_norm_eps",
    "num_hidden_layers": "layers",
    "cross_attention_frequency": "cross_attention_frequency",
}


def config_from_hub(weights: Mapping[str, Tensor], config: dict, path: Path) -> SubjectEncoderConfig:
    """The encoder's configuration from its weights and its ``config.json``, full or short.

    The shapes tell most; the config tells heads, epsilons and how many layers there must be.

    Raises:
        CheckpointError: the config asks for an activation this encoder does not have.
    """
    if not config.keys() & {"vision_config", "qformer_config"}:  # a lone file: the published model's
        return config_from_shapes(weights, {}, {}, path)
    vision = _VISION_DEFAULTS | config.get("vision_config", {})
    qformer = _QFORMER_DEFAULTS | config.get("qformer_config", {})
    for name, part, needed in (("vision", vision, "quick_gelu"), ("qformer", qformer, "gelu")):
        if part["hidden_act"] != needed:
            raise CheckpointError(
                f'{path}: its config gives the {name} part the activation "{part["hidden_act"]}", but BLIP-Diffusion '
                f'has "{needed}": use the published config.json.'
            )
    return config_from_shapes(weights, _ours(vision), _ours(qformer), path)


def _ours(config: dict) -> dict:
    return {_FIELDS[name]: value for name, value in config.items() if name in _FIELDS}
