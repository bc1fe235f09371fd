"""Collate functions: lists of pairs become batches.

They run in the DataLoader's workers, of which there are many, so nothing here loads a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..encoder import preprocess
from ..encoder.tokenizer import bert_tokenizer
from .pairs import Pair

#: A batch by name; each value is a list or a tensor with one entry for each pair.
Batch = dict[str, Any]


def multimodal_batch(pairs: Sequence[Pair], size: int, tokens: int) -> Batch:
    """Collate photographs and their captions for the paper's first stage.

    Args:
        pairs: The pairs.
        size: Edge of the encoder's images in pixels.
        tokens: Length T to which ``[CLS] caption [SEP]`` is cut or padded.

    Returns:
        ``keys``; ``pixel_values`` of shape [B, 3, size, size]; ``input_ids`` and ``attention_mask`` of shape [B, T].
    """
    encodings = bert_tokenizer().encode_batch([pair.caption for pair in pairs], add_special_tokens=False)
    cls, sep, pad = (bert_tokenizer().token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    captions = [[cls, *encoding.ids[: tokens - 2], sep] for encoding in encodings]
    padding = [tokens - len(ids) for ids in captions]
    return {
        "keys": [pair.key for pair in pairs],
        "pixel_values": to_pixel_values([pair.target for pair in pairs], size),
        "input_ids": torch.tensor([ids + n * [pad] for ids, n in zip(captions, padding, strict=True)]),
        "attention_mask": torch.tensor([(tokens - n) * [1] + n * [0] for n in padding]),
    }


def subject_batch(pairs: Sequence[Pair], size: int, resolution: int) -> Batch:
    """Collate pairs for the paper's second stage.

    Args:
        pairs: The pairs.
        size: Edge of the encoder's images in pixels.
        resolution: Edge of the square targets in pixels.

    Returns:
        ``keys``, ``captions`` and ``words``; ``subjects`` in 0..1 and ``pixel_values`` as the encoder expects them,
        both of shape [B, 3, size, size]; ``targets`` of shape [B, 3, resolution, resolution] in 0..1.
    """
    targets = [ImageOps.fit(pair.target, (resolution, resolution), Image.Resampling.BICUBIC) for pair in pairs]
    return {
        "keys": [pair.key for pair in pairs],
        "captions": [pair.caption for pair in pairs],
        "subjects": torch.stack([to_pixels(pair.subject.resize((size, size))) for pair in pairs]),
        "pixel_values": to_pixel_values([pair.subject for pair in pairs], size),
        "words": [pair.word for pair in pairs],
        "targets": torch.stack([to_pixels(target) for target in targets]),
    }


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an image to a tensor of shape [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def to_pixel_values(images: Sequence[Image.Image], size: int) -> Tensor:
    """Preprocess images for the image encoder.

    Args:
        images: Images of any sizes.
        size: Edge of the encoder's images in pixels.

    Returns:
        Pixel values of shape [B, 3, size, size].
    """
    pixels = [torch.from_numpy(np.asarray(image, np.float32) / 255)[None] for image in images]  # each [1, H, W, 3]
    return torch.cat([preprocess(each, size=size) for each in pixels])
