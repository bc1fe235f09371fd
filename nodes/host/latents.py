"""Latents repeated for a batch, with the same noise for all of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker

Latent = dict[str, Any]  # the host's: "samples" [B, C, H, W], and perhaps "noise_mask" and "batch_index"


def repeat_for_batches(latent: Latent | None, sizes: Sequence[int]) -> list[Latent | ExecutionBlocker]:
    """Repeat a latent for each batch of a trajectory.

    Args:
        latent: Latent whose first image is repeated; None if none is connected.
        sizes: Number of images in each batch.

    Returns:
        A latent for each batch; without one, what stops the nodes that would use it, and no others.
    """
    if latent is None:
        missing = "Subject Trajectory has no latent to repeat: connect an Empty Latent Image to it."
        return [ExecutionBlocker(missing)] * len(sizes)
    return [repeat_with_same_noise(latent, size) for size in sizes]


def repeat_with_same_noise(latent: Latent, batch_size: int) -> Latent:
    """Repeat a latent's first image; the sampler gives all copies the noise that it gives the first.

    The host counts noise by ``batch_index``: equal numbers get equal noise.

    Args:
        latent: Latent whose first image is repeated.
        batch_size: Number of copies.
    """
    samples = latent["samples"][:1]
    repeated = {**latent, "samples": samples.repeat(batch_size, *[1] * (samples.ndim - 1))}
    repeated["batch_index"] = list(latent.get("batch_index", [0]))[:1] * batch_size
    if "noise_mask" in latent:
        repeated["noise_mask"] = latent["noise_mask"][:1]
    return repeated
