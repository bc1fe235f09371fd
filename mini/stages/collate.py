"""Collate functions of the small model's own stages; those of the paper's are in ``blip_qformer.data.collate``."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageOps

from blip_qformer.data.collate import Batch, to_pixel_values, to_pixels
from blip_qformer.data.pairs import Pair


def autoencoder_batch(pairs: Sequence[Pair], crop: int) -> Batch:
    """Collate pairs for a VAE.

    Args:
        pairs: The pairs.
        crop: Edge of the crops that will be made, in pixels; smaller targets are scaled up to it.

    Returns:
        ``keys``; ``pixels``, the targets, each of shape [3, H, W] of its own size in 0..1.
    """
    targets = [
        pair.target if min(pair.target.size) >= crop else ImageOps.fit(pair.target, (crop, crop)) for pair in pairs
    ]
    return {"keys": [pair.key for pair in pairs], "pixels": [to_pixels(target) for target in targets]}


def vision_batch(pairs: Sequence[Pair], size: int) -> Batch:
    """Collate pairs for an image encoder that sees subject and target.

    Args:
        pairs: The pairs.
        size: Edge of the encoder's images in pixels.

    Returns:
        ``keys``; ``subjects`` and ``targets``, pixel values of shape [B, 3, size, size].
    """
    return {
        "keys": [pair.key for pair in pairs],
        "subjects": to_pixel_values([pair.subject for pair in pairs], size),
        "targets": to_pixel_values([pair.target for pair in pairs], size),
    }
