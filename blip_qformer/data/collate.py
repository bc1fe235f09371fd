"""Pairs become batches.

This runs in the processes that read pairs, of which there are many: nothing here imports a model.
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

#: What was made of some pairs, by name; a list or a tensor holds something for each of them.
Batch = dict[str, Any]


def autoencoder_batch(pairs: Sequence[Pair], crop: int) -> Batch:
    """The targets, each of its own size, and none smaller than what is cropped of it."""
    targets = [
        pair.target if min(pair.target.size) >= crop else ImageOps.fit(pair.target, (crop, crop)) for pair in pairs
    ]
    return {"keys": [pair.key for pair in pairs], "pixels": [to_pixels(target) for target in targets]}


def vision_batch(pairs: Sequence[Pair], size: int) -> Batch:
    """Both pictures as the image encoder reads them, ``size`` pixels square."""
    return {
        "keys": [pair.key for pair in pairs],
        "subjects": _pixel_values([pair.subject for pair in pairs], size),
        "targets": _pixel_values([pair.target for pair in pairs], size),
    }


def multimodal_batch(pairs: Sequence[Pair], size: int, tokens: int) -> Batch:
    """Photographs as the image encoder reads them; captions as ``[CLS] caption [SEP]``, cut or padded to one length."""
    encodings = bert_tokenizer().encode_batch([pair.caption for pair in pairs], add_special_tokens=False)
    begin, end, padding = map(bert_tokenizer().token_to_id, ("[CLS]", "[SEP]", "[PAD]"))
    captions = [[begin, *encoding.ids[: tokens - 2], end] for encoding in encodings]
    missing = [tokens - len(ids) for ids in captions]
    return {
        "keys": [pair.key for pair in pairs],
        "pixel_values": _pixel_values([pair.target for pair in pairs], size),
        "input_ids": torch.tensor([ids + n * [padding] for ids, n in zip(captions, missing, strict=True)]),
        "attention_mask": torch.tensor([(tokens - n) * [1] + n * [0] for n in missing]),
    }


def subject_batch(pairs: Sequence[Pair], size: int, resolution: int) -> Batch:
    """Subjects as the encoder reads them, ``size`` pixels square; targets fitted to a square of ``resolution``."""
    targets = [ImageOps.fit(pair.target, (resolution, resolution), Image.Resampling.BICUBIC) for pair in pairs]
    return {
        "keys": [pair.key for pair in pairs],
        "captions": [pair.caption for pair in pairs],
        "subjects": torch.stack([to_pixels(pair.subject.resize((size, size))) for pair in pairs]),
        "pixel_values": _pixel_values([pair.subject for pair in pairs], size),
        "words": [pair.word for pair in pairs],
        "targets": torch.stack([to_pixels(target) for target in targets]),
    }


def to_pixels(picture: Image.Image) -> Tensor:
    """A picture -> [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def _pixel_values(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Pictures of any sizes -> [B, 3, size, size] for the image encoder."""
    floats = [torch.from_numpy(np.asarray(picture, np.float32) / 255)[None] for picture in pictures]
    return torch.cat([preprocess(each, size=size) for each in floats])
