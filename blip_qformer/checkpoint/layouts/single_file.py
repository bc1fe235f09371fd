"""Our own layout: the Q-Former in the Hub's keys, with its configuration in the header of one ``.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...encoder import SubjectEncoderConfig
from ...plain_data import parse_json
from ..read_tensors import CheckpointError, read_config, read_metadata
from ..write_safetensors import write_safetensors
from . import hub

CONFIG_KEY = "blip_qformer.config"


def save_qformer(
    path: Path,
    state_dict: Mapping[str, Tensor],
    config: SubjectEncoderConfig,
    *,
    dtype: torch.dtype | None = torch.float16,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a subject encoder as one ``.safetensors`` file.

    Args:
        path: The file to write.
        state_dict: The weights, in the keys of ``SubjectEncoder.state_dict()``.
        config: The sizes, kept in the file's header.
        dtype: The dtype to cast to; None keeps that of the weights.
        overwrite: Whether an existing file may be replaced.
        progress: A function called with the number of bytes just written.

    Raises:
        OSError: The file exists, its folder is missing, or the disk is too full.
        ValueError: A weight does not fit into ``dtype``.
    """
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}
    tensors = hub.KEY_MAP.to_file(state_dict)
    write_safetensors(path, tensors, metadata=metadata, dtype=dtype, overwrite=overwrite, progress=progress)


def config_from_file(state_dict: Mapping[str, Tensor], path: Path) -> SubjectEncoderConfig:
    """Return the configuration of a Q-Former in the Hub's keys.

    Args:
        state_dict: The weights, in the encoder's keys.
        path: The file. Its header is read first; without a configuration there, a ``config.json`` beside the file;
            without one, the shapes.

    Raises:
        CheckpointError: The header or the config file cannot be used.
    """
    header = read_metadata(path).get(CONFIG_KEY)
    if header is None:
        return hub.config_from_hub(state_dict, read_config(path.parent), path)
    try:
        return SubjectEncoderConfig.from_dict(parse_json(header, "its header"), "its header")
    except ValueError as error:
        raise CheckpointError(
            f"{path} describes itself in a way this version does not know ({error}): update the pack, or download the "
            "file again."
        ) from error
