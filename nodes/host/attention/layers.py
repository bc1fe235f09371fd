"""Where in the U-Net and in the batch a patch of an attention layer was called, read from what the host tells it."""

from __future__ import annotations

import math
from typing import Any, cast
from uuid import UUID

from comfy.ldm.modules.attention import CrossAttention, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

#: Self-attention is injected in maps of at most a quarter of the latents' edges: 16 x 16 for 512 x 512 pixels.
QUARTER = 4

ExtraOptions = dict[str, Any]  # the host's transformer_options, as every patch gets them


def unet_blocks(unet: UNetModel) -> dict[tuple[str, int], nn.Module]:
    """Return a U-Net's blocks by the names that the host has for them, such as ``("input", 4)``."""
    blocks: dict[tuple[str, int], nn.Module] = {("input", index): each for index, each in enumerate(unet.input_blocks)}
    if unet.middle_block is not None:
        blocks["middle", 0] = unet.middle_block
    return blocks | {("output", index): each for index, each in enumerate(unet.output_blocks)}


def calling_layer(unet: UNetModel, extra_options: ExtraOptions) -> CrossAttention:
    """Return the cross-attention layer that called a patch."""
    block = unet_blocks(unet)[extra_options["block"]]
    (transformer,) = [layer for layer in block.children() if isinstance(layer, SpatialTransformer)]
    return cast(CrossAttention, transformer.transformer_blocks[extra_options["block_index"]].attn2)


def conditioning_rows(batch_size: int, extra_options: ExtraOptions) -> list[tuple[UUID, slice]]:
    """Return which rows of a call belong to which conditioning, in the order of the batch.

    Args:
        batch_size: Number of rows in the call.
        extra_options: What the host tells a patch.

    Returns:
        The host's id of each conditioning, and its rows: as many for each.
    """
    uuids = extra_options["uuids"]
    count = batch_size // len(uuids)
    return [(uuid, slice(index * count, (index + 1) * count)) for index, uuid in enumerate(uuids)]


def require_known_rows(batch_size: int, extra_options: ExtraOptions) -> None:
    """Refuse a call of the model in which it is not known which row belongs to which conditioning.

    Args:
        batch_size: Number of rows in the call.
        extra_options: What the host tells a patch.

    Raises:
        ValueError: There are other rows than the sampler's, such as several tiles of each image.
    """
    num_conds, count = len(extra_options["uuids"]), len(extra_options["sigmas"])
    if batch_size != num_conds * count:
        raise ValueError(
            f"The model was called with {batch_size} pictures where the sampler has {count} for each of {num_conds} "
            "prompts, so that it is not known which belongs to which: let what draws the picture in tiles draw one "
            "tile at a time, or take out the node that edits or records attention."
        )


def map_size(extra_options: ExtraOptions) -> tuple[int, int]:
    """Return height and width of the maps of the layer that called a patch."""
    height, width = extra_options["activations_shape"][-2:]
    return height, width


def latent_size(extra_options: ExtraOptions) -> tuple[int, int]:
    """Return height and width of the latents that the model was called with: those of an area, if there is one."""
    height, width = extra_options["original_shape"][-2:]
    return height, width


def is_coarse(extra_options: ExtraOptions) -> bool:
    """Whether a layer's maps have at most a quarter of the latents' edges; the U-Net rounds up where it halves."""
    sizes = zip(map_size(extra_options), latent_size(extra_options), strict=True)
    return all(edge <= math.ceil(latent_edge / QUARTER) for edge, latent_edge in sizes)
