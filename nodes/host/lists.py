"""Nodes that get all of a list in one call, and the images and masks in such lists.

The host calls a node once for each item of a list, unless the node's schema has ``is_input_list``; then every input
is a list. Stock loaders of folders give a list of images, because those of a batch have one size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

ResultT = TypeVar("ResultT")

BLANK_MASK_EDGE = 64  # of the mask that Load Image gives beside a picture without transparency

log = logging.getLogger("blip_diffusion")


def takes_lists(*names: str) -> Callable[[Callable[..., ResultT]], Callable[..., ResultT]]:
    """Let an ``execute`` with ``is_input_list`` take lists for some inputs, and a single value for all others.

    Args:
        *names: Inputs that are lists.
    """

    def decorate(execute: Callable[..., ResultT]) -> Callable[..., ResultT]:
        @wraps(execute)
        def execute_once(cls: type, **inputs: Sequence[Any]) -> ResultT:
            given = {name: list(value) if name in names else only(name, value) for name, value in inputs.items()}
            return execute(cls, **given)

        return execute_once

    return decorate


def only(name: str, values: Sequence[Any]) -> Any:
    """Return the one value of a list.

    Args:
        name: Name of the input.
        values: Its values.

    Raises:
        ValueError: There are several different ones.
    """
    first, *others = values
    is_plain = isinstance(first, (str, int, float, bool))
    if any(other != first if is_plain else other is not first for other in others):
        raise ValueError(f"{name} is a list of {len(values)}, but this node takes one: connect a single one.")
    return first


def merge_batches(batches: Sequence[Tensor]) -> list[Tensor]:
    """Make one batch of images that have one size and one number of channels; others stay as they are.

    Args:
        batches: Batches of shape [B, H, W, C].
    """
    return [torch.cat(list(batches))] if len({batch.shape[1:] for batch in batches}) == 1 else list(batches)


def match_masks(masks: Sequence[Tensor] | None, images: Sequence[Tensor]) -> list[Tensor | None]:
    """Find the masks of each batch of images.

    Args:
        masks: Masks as they arrive, each of shape [B, H, W], [H, W] or [B, 1, H, W]: one for all images, one item for
            each item of images, or as many masks as there are images; None if none are connected.
        images: Batches of shape [B, H, W, C].

    Returns:
        For each batch what :func:`~blip_qformer.encoder.preprocessing.fit_mask` takes, or None if all of it counts.

    Raises:
        ValueError: There are several masks, and not as many as images.
    """
    if masks is None:
        return [None] * len(images)
    masks = [mask.reshape(-1, *mask.shape[-2:]) for mask in masks]  # each [B, H, W]
    if len(masks) == 1 and len(masks[0]) == 1:
        matched = masks * len(images)
    elif len(masks) == len(images):
        matched = masks
    else:
        rows = [mask[None] for each in masks for mask in each]  # each [1, H, W]
        count = sum(map(len, images))
        if len(rows) != count:
            raise ValueError(
                f"There are {count} picture(s) but {len(rows)} masks: give one mask for all pictures, or one for each."
            )
        matched, start = [], 0
        for batch in images:
            matched.append(torch.cat(rows[start : start + len(batch)]))
            start += len(batch)
    return [drop_blank_mask(mask) for mask in matched]


def drop_blank_mask(mask: Tensor) -> Tensor | None:
    """Return the mask, or None for the one that Load Image gives beside a picture without transparency.

    Args:
        mask: Masks of shape [B, H, W].
    """
    if mask.shape[-2:] == (BLANK_MASK_EDGE, BLANK_MASK_EDGE) and (mask == mask.flatten()[0]).all():
        log.info("The mask says nothing, because its picture has no transparency: it is ignored.")
        return None
    return mask
