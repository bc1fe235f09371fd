"""The ``config.json`` of a U-Net, ControlNet, VAE or text encoder, checked where something is built by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, Strict

from ..encoder.config import Epsilon, Heads, Layers, Positions, Vocabulary, Width
from ..plain_data import PlainDataError, needs, validate
from .read_tensors import CheckpointError

MAX_LEVELS = 16  # of a U-Net or VAE; SD1.5 has 4

PerLevel = Field(min_length=1, max_length=MAX_LEVELS)
Texts = Annotated[list[Annotated[str, Strict()]], PerLevel, needs("a list of names")]
OneOrMany = needs("a whole number within bounds, or a list of them,")


class NetworkConfig(BaseModel):
    """What decides sizes and numbers of layers; other names may have any value, and all may be missing."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    block_out_channels: Annotated[list[Width], PerLevel, needs("a list of widths")] | None = None
    down_block_types: Texts | None = None
    up_block_types: Texts | None = None
    layers_per_block: Annotated[Layers | Annotated[list[Layers], PerLevel], OneOrMany] | None = None
    transformer_layers_per_block: Annotated[Layers | Annotated[list[Layers], PerLevel], OneOrMany] | None = None
    num_attention_heads: Annotated[Heads | Annotated[list[Heads], PerLevel], OneOrMany] | None = None
    attention_head_dim: Annotated[Heads | Annotated[list[Heads], PerLevel], OneOrMany] | None = None
    cross_attention_dim: Annotated[Width | Annotated[list[Width], PerLevel], OneOrMany] | None = None
    norm_num_groups: Width | None = None
    in_channels: Width | None = None
    out_channels: Width | None = None
    latent_channels: Width | None = None
    scaling_factor: (
        Annotated[float, Strict(), AllowInfNan(False), Field(gt=0, le=1000), needs("a number above 0")] | None
    ) = None
    num_hidden_layers: Layers | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    vocab_size: Vocabulary | None = None
    max_position_embeddings: Positions | None = None
    layer_norm_eps: Epsilon | None = None


def check_network_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config whose values cannot be those of a network.

    Args:
        config: The content of ``config.json``; empty if there is none.
        path: That file.

    Raises:
        CheckpointError: A value is of another type, or out of bounds.
    """
    try:
        validate(NetworkConfig, config, str(path))
    except PlainDataError as error:
        raise CheckpointError(f"{error} Download the published {path.name} again.") from error
