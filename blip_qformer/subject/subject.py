"""A subject: the vectors that stand for a thing in a prompt, and the word for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Subject:
    """The vectors of a subject and the word for it.

    Args:
        vectors: Vectors [N, 16, 768] of N views of one thing, or of N things; kept in float32 on the CPU.
        word: The word that the encoder was given, such as "dog".
        encoder: The :func:`~blip_qformer.subject.provenance.encoder_hash` of its encoder; empty if not known.
        source: The :func:`~blip_qformer.subject.provenance.image_hash` of its image; empty if not known.
        preview: A small JPEG of its images, see :mod:`~blip_qformer.subject.preview`; empty if there is none.

    Raises:
        ValueError: The vectors have another number of axes, or hold NaN.
    """

    vectors: Tensor
    word: str
    encoder: str = ""
    source: str = ""
    preview: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3:
            raise ValueError(
                f"A subject's vectors have the shape [batch, 16, 768], but these have {list(self.vectors.shape)}: "
                "take them from a subject encoder."
            )
        vectors = self.vectors.detach().to("cpu", torch.float32)
        if not torch.isfinite(vectors).all():
            raise ValueError(
                f'The vectors of the subject "{self.word}" hold NaN or infinity: its checkpoint is damaged, '
                "download it again."
            )
        object.__setattr__(self, "vectors", vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def average(self) -> Subject:
        """Average several views into one row, the mean of their vectors (arXiv 2305.14720, section 3.3)."""
        return replace(self, vectors=self.vectors.mean(dim=0, keepdim=True))


def split_rows(subject: Subject, size: int) -> list[Subject]:
    """Split a subject of N rows into subjects of at most ``size`` rows, in order."""
    return [replace(subject, vectors=vectors) for vectors in subject.vectors.split(size)]
