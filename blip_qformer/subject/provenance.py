"""Where a subject came from: short hashes that tell one encoder, and one picture, from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .subject import Subject

HASH_LENGTH = 16  # hexadecimal digits: short enough to read, too many to meet by chance
QUERIES, PROJECTION = "qformer.query_tokens", "projection.contract.weight"
PROJECTION_ROWS = 16


def encoder_hash(weights: Mapping[str, Tensor]) -> str:
    """Which subject encoder these weights are; the same for the published float32 file and its float16 conversion.

    It reads what training always changes, the queries and the first rows of the projection, and not the gigabyte around
    them. Take the weights as the file has them: rounded to bfloat16 they are others.

    Args:
        weights: in the encoder's own names, as ``SubjectEncoder.state_dict()`` has them.
    """
    digest = hashlib.sha256()
    for weight in (weights[QUERIES], weights[PROJECTION][:PROJECTION_ROWS]):
        digest.update(_bytes(weight.detach().to("cpu", torch.float16)))
    return digest.hexdigest()[:HASH_LENGTH]


def image_hash(images: Tensor) -> str:
    """Which pictures [B, H, W, C] in 0..1 these are, in 8 bits a colour, as files hold them."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for image in images:  # one by one: a copy of all would double the memory
        digest.update(_bytes((image.clamp(0, 1) * 255).round().to("cpu", torch.uint8)))
    return digest.hexdigest()[:HASH_LENGTH]


def encoder_mismatch(subject: Subject, encoder: str) -> str:
    """A sentence that warns of a subject made by another encoder than this one; empty where there is no reason to."""
    if not encoder or subject.encoder == encoder:
        return ""
    if not subject.encoder:
        return (
            f'It is not known which encoder made the subject "{subject.word}": if the pictures show something else, '
            "encode it again with this Q-Former."
        )
    return (
        f'The subject "{subject.word}" was made by the encoder {subject.encoder}, and this Q-Former is {encoder}: its '
        "vectors may mean something else here; encode it again with this Q-Former."
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data
