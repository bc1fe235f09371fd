"""The Q-Former as the authors' own code (LAVIS) saves it: ``blip_model/`` and ``proj_layer/`` of an original folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...encoder import SubjectEncoderConfig
from ..infer_config import config_from_shapes
from ..key_map import KeyMap, projection_names, qformer_names

_VISION = "visual_encoder"


_BLOCK = "visual_encoder.transformer.resblocks.{}"


#: Heads that stage 1 trains and generation does not use.
STAGE_1_HEADS = ("vision_proj.", "text_proj.", "itm_head.", "Qformer.cls.", "temp")


NAMES = KeyMap(
    {
        "query_tokens": "qformer.query_tokens",
        **qformer_names(prefix="Qformer.bert.", attention="self"),
        **projection_names(prefix="proj_layer."),
        f"{_VISION}.class_embedding": "vision.class_embedding",
        f"{_VISION}.conv1": "vision.patch_embedding",
        f"{_VISION}.positional_embedding": "vision.position_embedding",
        f"{_VISION}.ln_pre": "vision.pre_norm",
        "ln_vision": "vision.post_norm",
        f"{_BLOCK}.ln_1": "vision.blocks.{}.attention_norm",
        f"{_BLOCK}.attn.in_proj_weight": "vision.blocks.{}.attention.query_key_value.weight",
        f"{_BLOCK}.attn.in_proj_bias": "vision.blocks.{}.attention.query_key_value.bias",
        f"{_BLOCK}.attn.out_proj": "vision.blocks.{}.attention.output",
        f"{_BLOCK}.ln_2": "vision.blocks.{}.feed_forward_norm",
        f"{_BLOCK}.mlp.c_fc": "vision.blocks.{}.expand",
        f"{_BLOCK}.mlp.c_proj": "vision.blocks.{}.contract",
    },
    ignored=STAGE_1_HEADS,
)


def encoder_from_lavis(
    qformer: Mapping[str, Tensor], projection: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], SubjectEncoderConfig]:
    """Weights in the encoder's own names and their configuration, from the two files of an original folder.

    LAVIS writes no config: heads are 64 wide, everything else is read off the shapes.
    """
    both = {**qformer, **{f"proj_layer.{name}": tensor for name, tensor in projection.items()}}
    weights = NAMES.to_encoder(both, path)
    for name in ("vision.class_embedding", "vision.position_embedding"):  # saved without the batch axis
        if name in weights:
            weights[name] = weights[name].reshape(1, -1, weights[name].shape[-1])
    return weights, config_from_shapes(weights, {}, {}, path)
