"""The encoder's configuration, read off the shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

from torch import Tensor

from ..encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from .key_map import REMEDY, KeyMap, listed
from .read_tensors import CheckpointError

HEAD_WIDTH = 64  # of the published model, in the image encoder as in the Q-Former


def config_from_shapes(
    weights: Mapping[str, Tensor], vision: Mapping[str, object], qformer: Mapping[str, object], path: Path
) -> SubjectEncoderConfig:
    """A configuration for weights in the encoder's own names.

    Args:
        vision, qformer: fields of :class:`VisionConfig` and :class:`QFormerConfig` that something better than the
            shapes tells (a config file); without them, heads are 64 wide and the rest is the published model's.

    Raises:
        CheckpointError: a tensor that tells a size is missing.
    """
    try:
        vision_width, _, patch_size, _ = weights["vision.patch_embedding.weight"].shape
        image_size = isqrt(weights["vision.position_embedding"].shape[1] - 1) * patch_size
        width = weights["qformer.query_tokens"].shape[-1]
        seeing = _layers(weights, "qformer.layers.", ".cross_attention.query.weight")
        return SubjectEncoderConfig(
            vision=VisionConfig(
                **{
                    "image_size": image_size,
                    "patch_size": patch_size,
                    "width": vision_width,
                    "layers": _count(weights, "vision.blocks.", ".expand.weight"),
                    "heads": max(1, vision_width // HEAD_WIDTH),
                    "feed_forward_width": weights["vision.blocks.0.expand.weight"].shape[0],
                    **vision,
                }
            ),
            qformer=QFormerConfig(
                **{
                    "width": width,
                    "layers": _count(weights, "qformer.layers.", ".query_feed_forward.expand.weight"),
                    "heads": max(1, width // HEAD_WIDTH),
                    "feed_forward_width": weights["qformer.layers.0.query_feed_forward.expand.weight"].shape[0],
                    "query_tokens": weights["qformer.query_tokens"].shape[1],
                    "cross_attention_frequency": seeing[1] - seeing[0] if len(seeing) > 1 else 1,
                    "vocabulary_size": weights["qformer.word_embedding.weight"].shape[0],
                    "text_positions": weights["qformer.position_embedding.weight"].shape[0],
                    **qformer,
                }
            ),
            projection_width=weights["projection.expand.weight"].shape[0],
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]!r} of the subject encoder: {REMEDY}") from error


def check_weights(weights: Mapping[str, Tensor], config: SubjectEncoderConfig, table: KeyMap, path: Path) -> None:
    """Refuse weights that are not exactly those of the configuration, naming them as the file does.

    Raises:
        CheckpointError: tensors are missing, too many, or of another shape.
    """
    expected = SubjectEncoder(config, device="meta").state_dict()
    if missing := [table.file_name(name) for name in expected.keys() - weights.keys()]:
        raise CheckpointError(f"{path} lacks {listed(missing)} of the subject encoder: {REMEDY}")
    if unexpected := [table.file_name(name) for name in weights.keys() - expected.keys()]:
        raise CheckpointError(f"{path} holds {listed(unexpected)} beyond what its config describes: {REMEDY}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f'{path} holds "{table.file_name(name)}" of shape {list(tensor.shape)}, but its config asks for '
                f"{list(expected[name].shape)}: {REMEDY}"
            )


def _layers(weights: Mapping[str, Tensor], prefix: str, suffix: str) -> list[int]:
    """Numbers of the layers that have a tensor ``prefix<number>suffix``, in order."""
    return sorted(int(n[len(prefix) : -len(suffix)]) for n in weights if n.startswith(prefix) and n.endswith(suffix))


def _count(weights: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    return max(_layers(weights, prefix, suffix), default=-1) + 1
