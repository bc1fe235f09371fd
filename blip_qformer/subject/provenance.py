"""The provenance of a subject: short hashes that tell one encoder, and one image, from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .subject import Subject

HASH_LENGTH = 16  # hexadecimal digits: short enough to read, long enough not to collide
QUERIES, PROJECTION = "qformer.query_tokens", "projection.contract.weight"
PROJECTION_ROWS = 16


def encoder_hash(state_dict: Mapping[str, Tensor]) -> str:
    """Hash the weights of a subject encoder, the same for the published float32 file and its float16 conversion.

    Only what training always changes is read, the queries and the first rows of the projection, and not the gigabyte
    around them.

    Args:
        state_dict: The weights, in the keys of ``SubjectEncoder.state_dict()`` and the dtype of the file: rounded to
            bfloat16 they have another hash.

    Returns:
        The hash in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for weight in (state_dict[QUERIES], state_dict[PROJECTION][:PROJECTION_ROWS]):
        digest.update(_bytes(weight.detach().to("cpu", torch.float16)))
    return digest.hexdigest()[:HASH_LENGTH]


def image_hash(images: Tensor) -> str:
    """Hash images [B, H, W, C] in 0..1 as 8-bit values, which files hold."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for image in images:  # one by one: a copy of all would double the memory
        digest.update(_bytes((image.clamp(0, 1) * 255).round().to("cpu", torch.uint8)))
    return digest.hexdigest()[:HASH_LENGTH]


def encoder_mismatch(subject: Subject, encoder: str) -> str:
    """Return a sentence that warns of a subject made by another encoder; empty if there is no reason to.

    Args:
        subject: The subject.
        encoder: The :func:`encoder_hash` of the encoder in use; empty if not known.
    """
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
