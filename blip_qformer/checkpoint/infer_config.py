"""Infer the subject encoder's configuration from the shapes of its weights, and check weights against one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from ..encoder import SubjectEncoder, SubjectEncoderConfig
from .key_map import ADVICE, KeyMap, format_keys
from .module_tree import shape_of
from .read_tensors import CheckpointError
from .weights import check_dtypes

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
        CheckpointError: A tensor that tells a size is missing or has other axes, or a size is out of bounds.
    """
    shape = partial(_shape, state_dict, path)
    vision_width, _, patch_size, _ = shape("vision.patch_embedding.weight", 4)
    _, query_tokens, width = shape("qformer.query_tokens", 3)
    cross_attention = _layers(state_dict, "qformer.layers.", ".cross_attention.query.weight")
    inferred_vision = {
        "image_size": isqrt(shape("vision.position_embedding", 3)[1] - 1) * patch_size,
        "patch_size": patch_size,
        "width": vision_width,
        "layers": _count(state_dict, "vision.blocks.", ".expand.weight"),
        "heads": max(1, vision_width // HEAD_WIDTH),
        "feed_forward_width": shape("vision.blocks.0.expand.weight", 2)[0],
    }
    feed_forward = "qformer.layers.0.query_feed_forward.expand.weight"
    inferred_qformer = {
        "width": width,
        "layers": _count(state_dict, "qformer.layers.", ".query_feed_forward.expand.weight"),
        "heads": max(1, width // HEAD_WIDTH),
        "feed_forward_width": shape(feed_forward, 2)[0],
        "query_tokens": query_tokens,
        "cross_attention_frequency": cross_attention[1] - cross_attention[0] if len(cross_attention) > 1 else 1,
        "vocabulary_size": shape("qformer.word_embedding.weight", 2)[0],
        "text_positions": shape("qformer.position_embedding.weight", 2)[0],
    }
    values = {
        "vision": {**inferred_vision, **vision},
        "qformer": {**inferred_qformer, **qformer},
        "projection_width": shape("projection.expand.weight", 2)[0],
    }
    return config_from_dict(values, path)


def config_from_dict(values: Mapping[str, Any], path: Path) -> SubjectEncoderConfig:
    """Read a configuration from plain values, as a file holds them.

    Args:
        values: The fields of :meth:`SubjectEncoderConfig.to_dict`.
        path: The file, for the error message.

    Raises:
        CheckpointError: A value is of another type, or out of bounds.
    """
    try:
        return SubjectEncoderConfig.from_dict(values, f"The subject encoder's configuration in {path}")
    except ValueError as error:
        raise CheckpointError(f"{error} {ADVICE.capitalize()}") from error


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
        CheckpointError: Tensors are missing, too many, or of another shape or dtype.
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
    check_dtypes({key_map.file_key(key): tensor for key, tensor in state_dict.items()}, path)


def _shape(state_dict: Mapping[str, Tensor], path: Path, key: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor that tells a size; CheckpointError if it is not there or has other axes."""
    if key not in state_dict:
        raise CheckpointError(f"{path} lacks {key!r} of the subject encoder: {ADVICE}")
    try:
        return shape_of(state_dict, key, axes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _layers(keys: Mapping[str, Tensor], prefix: str, suffix: str) -> list[int]:
    """Return the numbers of the layers that have a tensor ``prefix<number>suffix``, in order."""
    names = [key[len(prefix) : -len(suffix)] for key in keys if key.startswith(prefix) and key.endswith(suffix)]
    return sorted(int(name) for name in names if name.isdecimal() and len(name) < 4)


def _count(keys: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    """Return the number of layers; one beyond a gap will be unexpected, and what lies between is not built."""
    return len(_layers(keys, prefix, suffix))
