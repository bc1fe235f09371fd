"""A subject: the vectors that stand for a thing in a prompt, and the word for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Subject:
    """What the subject encoder saw.

    Args:
        vectors: [N, 16, 768], kept as float32 on the CPU; N views of one thing, or N things.
        word: what the encoder was asked about, "dog".
        encoder: which encoder made it, :func:`~blip_qformer.provenance.encoder_hash`; empty where that is not known.
        source: which picture it was made from, :func:`~blip_qformer.provenance.image_hash`; empty likewise.

    Raises:
        ValueError: the vectors have another number of axes, or hold NaN.
    """

    vectors: Tensor
    word: str
    encoder: str = ""
    source: str = ""

    def __post_init__(self):
        if self.vectors.ndim != 3:
            raise ValueError(
                f"A subject's vectors have the shape [batch, 16, 768], but these have {list(self.vectors.shape)}: "
                "take them from a subject encoder."
            )
        if not torch.isfinite(self.vectors).all():
            raise ValueError(
                f'The vectors of the subject "{self.word}" hold NaN or infinity: its checkpoint is damaged, '
                "download it again."
            )
        object.__setattr__(self, "vectors", self.vectors.detach().to("cpu", torch.float32))

    def __len__(self) -> int:
        return len(self.vectors)

    def average(self) -> Subject:
        """One subject out of several views, the mean of their vectors (arXiv 2305.14720, section 3.3)."""
        return replace(self, vectors=self.vectors.mean(dim=0, keepdim=True))


def split_rows(subject: Subject, most: int) -> list[Subject]:
    """A subject of N rows as subjects of at most ``most`` rows, in order."""
    return [replace(subject, vectors=vectors) for vectors in subject.vectors.split(most)]
