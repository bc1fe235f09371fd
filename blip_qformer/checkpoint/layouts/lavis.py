"""The layout of the authors' own code (LAVIS): ``blip_model/`` and ``proj_layer/`` of an original folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...encoder import SubjectEncoderConfig
from ..infer_config import config_from_shapes
from ..key_map import KeyMap, projection_keys, qformer_keys

_VISION = "visual_encoder"
_BLOCK = "visual_encoder.transformer.resblocks.{}"

#: Heads that only stage 1 of training uses.
STAGE_1_HEADS = ("vision_proj.", "text_proj.", "itm_head.", "Qformer.cls.", "temp")

KEY_MAP = KeyMap(
    {
        "query_tokens": "qformer.query_tokens",
        **qformer_keys(prefix="Qformer.bert.", attention="self"),
        **projection_keys(prefix="proj_layer."),
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
    """Translate the two files of an original folder.

    LAVIS writes no config: heads are 64 wide, everything else is inferred from shapes.

    Args:
        qformer: The tensors of ``blip_model/``.
        projection: The tensors of ``proj_layer/``.
        path: The file of ``blip_model/``, for the error message.

    Returns:
        The weights in the encoder's keys, and their configuration.

    Raises:
        CheckpointError: A tensor is missing or unknown.
    """
    both = {**qformer, **{f"proj_layer.{key}": tensor for key, tensor in projection.items()}}
    state_dict = KEY_MAP.to_encoder(both, path)
    for key in ("vision.class_embedding", "vision.position_embedding"):  # LAVIS saves them without the batch axis
        if key in state_dict and state_dict[key].ndim:
            state_dict[key] = state_dict[key].reshape(1, -1, state_dict[key].shape[-1])  # [1, tokens, width]
    return state_dict, config_from_shapes(state_dict, {}, {}, path)
