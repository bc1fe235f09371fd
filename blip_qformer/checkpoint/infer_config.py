"""Infer the subject encoder's configuration from the shapes of its weights, and check weights against one."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from ..encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from .key_map import ADVICE, KeyMap, format_keys
from .read_tensors import CheckpointError

HEAD_WIDTH = 64  # of the published model, in the image encoder as in the Q-Former


def config_from_shapes(
    state_dict: Mapping[str, Tensor], vision: Mapping[str, Any], qformer: Mapping[str, Any], path: Path
) -> SubjectEncoderConfig:
    """Infer a configuration from weights.

    Args:
        state_dict: The weights, in the encoder's keys.
        vision: Fields of :class:`VisionConfig` that a config file tells; they replace the inferred ones. Without a
            config file, heads are 64 wide and the rest is as in the published model.
        qformer: Fields of :class:`QFormerConfig`, likewise.
        path: The file, for the error message.

    Raises:
        CheckpointError: A tensor that tells a size is missing.
    """
    try:
        vision_width, _, patch_size, _ = state_dict["vision.patch_embedding.weight"].shape
        image_size = isqrt(state_dict["vision.position_embedding"].shape[1] - 1) * patch_size
        width = state_dict["qformer.query_tokens"].shape[-1]
        cross_attention = _layers(state_dict, "qformer.layers.", ".cross_attention.query.weight")
        inferred_vision = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": vision_width,
            "layers": _count(state_dict, "vision.blocks.", ".expand.weight"),
            "heads": max(1, vision_width // HEAD_WIDTH),
            "feed_forward_width": state_dict["vision.blocks.0.expand.weight"].shape[0],
        }
        inferred_qformer = {
            "width": width,
            "layers": _count(state_dict, "qformer.layers.", ".query_feed_forward.expand.weight"),
            "heads": max(1, width // HEAD_WIDTH),
            "feed_forward_width": state_dict["qformer.layers.0.query_feed_forward.expand.weight"].shape[0],
            "query_tokens": state_dict["qformer.query_tokens"].shape[1],
            "cross_attention_frequency": cross_attention[1] - cross_attention[0] if len(cross_attention) > 1 else 1,
            "vocabulary_size": state_dict["qformer.word_embedding.weight"].shape[0],
            "text_positions": state_dict["qformer.position_embedding.weight"].shape[0],
        }
        return SubjectEncoderConfig(
            vision=VisionConfig(**{**inferred_vision, **vision}),
            qformer=QFormerConfig(**{**inferred_qformer, **qformer}),
            projection_width=state_dict["projection.expand.weight"].shape[0],
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]!r} of the subject encoder: {ADVICE}") from error


def check_state_dict(
    state_dict: Mapping[str, Tensor], config: SubjectEncoderConfig, key_map: KeyMap, path: Path
) -> None:
    """Refuse weights that are not exactly those of a configuration.

    Args:
        state_dict: The weights, in the encoder's keys.
        config: The configuration.
        key_map: The table of the file's layout, so that the error message names tensors as the file does.
        path: The file, for the error message.

    Raises:
        CheckpointError: Tensors are missing, too many, or of another shape.
    """
    expected = SubjectEncoder(config, device="meta").state_dict()
    if missing := [key_map.file_key(key) for key in expected.keys() - state_dict.keys()]:
        raise CheckpointError(f"{path} lacks {format_keys(missing)} of the subject encoder: {ADVICE}")
    if unexpected := [key_map.file_key(key) for key in state_dict.keys() - expected.keys()]:
        raise CheckpointError(f"{path} holds {format_keys(unexpected)} beyond what its config describes: {ADVICE}")
    for key, tensor in state_dict.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f'{path} holds "{key_map.file_key(key)}" of shape {list(tensor.shape)}, but its config asks for '
                f"{list(expected[key].shape)}: {ADVICE}"
            )


def _layers(keys: Mapping[str, Tensor], prefix: str, suffix: str) -> list[int]:
    """Return the numbers of the layers that have a tensor ``prefix<number>suffix``, in order."""
    return sorted(
        int(key[len(prefix) : -len(suffix)]) for key in keys if key.startswith(prefix) and key.endswith(suffix)
    )


def _count(keys: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    """Return the number of layers."""
    return max(_layers(keys, prefix, suffix), default=-1) + 1
