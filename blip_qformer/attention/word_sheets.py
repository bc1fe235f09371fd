"""The words of a recorded run as heatmaps over its images, each with a label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..imaging.contact_sheet import contact_sheet
from .maps import AttentionRecord, overlay_heatmap, to_heatmap


def word_sheets(
    record: AttentionRecord, images: Tensor, phrases: Sequence[str], strength: float
) -> tuple[Tensor, Tensor]:
    """Show where each word of a prompt attends.

    Args:
        record: Record of the run that sampled the images.
        images: Images of shape [B, H, W, 1, 3 or 4] in 0..1, on any device.
        phrases: Words to show, see :func:`~.words.find_phrase`; every word of the prompt if there are none.
        strength: Opacity of the heatmaps.

    Returns:
        Labelled images of shape [B * words, H', W', 3], image by image and word by word, and their heatmaps of shape
        [B * words, H, W] in 0..1.

    Raises:
        ValueError: If the prompt does not have one of the words, or no words at all.
    """
    phrases = phrases or record.words()
    if not phrases:
        raise ValueError("The recorded prompt has no words, only punctuation: write some, and draw again.")
    images = images.cpu()  # where the record is
    height, width = images.shape[1:3]
    maps = torch.stack([record.word_map(phrase, height, width) for phrase in phrases], dim=1)  # [B, words, H, W]
    labels = [f"{phrase} {word_map.mean():.1%}" for row in maps for phrase, word_map in zip(phrases, row, strict=True)]
    heatmaps = to_heatmap(maps.flatten(0, 1))
    overlaid = overlay_heatmap(images.repeat_interleave(len(phrases), dim=0), heatmaps, strength)
    sheets = [contact_sheet(image[None], labels=[label]) for image, label in zip(overlaid, labels, strict=True)]
    return torch.cat(sheets), heatmaps
