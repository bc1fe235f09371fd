"""Our own file: the Q-Former in the Hub's names, with its configuration in the header of the ``.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...encoder import SubjectEncoderConfig
from ..read_tensors import CheckpointError, read_config, read_metadata
from ..write_safetensors import write_safetensors
from . import hub

CONFIG_KEY = "blip_qformer.config"


def save_qformer(
    path: Path,
    weights: Mapping[str, Tensor],
    config: SubjectEncoderConfig,
    *,
    dtype: torch.dtype | None = torch.float16,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a subject encoder as one ``.safetensors`` file.

    Args:
        weights: in the encoder's own names, as ``SubjectEncoder.state_dict()`` has them.
        dtype: what to cast to; None keeps what is there. ``overwrite`` and ``progress``: see ``write_safetensors``.
    """
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}
    tensors = hub.NAMES.to_file(weights)
    write_safetensors(path, tensors, metadata=metadata, dtype=dtype, overwrite=overwrite, progress=progress)


def config_of_file(weights: Mapping[str, Tensor], path: Path) -> SubjectEncoderConfig:
    """The configuration of a Q-Former in one file: from its header, else a ``config.json`` beside it, else its shapes.

    Raises:
        CheckpointError: the header holds something else than a configuration.
    """
    header = read_metadata(path).get(CONFIG_KEY)
    if header is None:
        return hub.config_from_hub(weights, read_config(path.parent), path)
    try:
        return SubjectEncoderConfig.from_dict(json.loads(header))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} describes itself in a way this version does not know ({error}): update the pack."
        ) from error
