"""Which of several images shows a subject best, by the Q-Former's own opinion.

An image that was sampled with a subject is encoded with the subject's word, as the subject's own image was. The nearer
its vectors are to the subject's, the more alike the two are. Fine-tuning chooses the step that it keeps by the same
numbers (:mod:`blip_qformer.finetune.validation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .subject import Subject


def likeness(vectors: Tensor, reference: Tensor) -> Tensor:
    """Compute how alike two sets of subject vectors are, row by row.

    Args:
        vectors: Subject vectors of shape [B, 16, width].
        reference: Subject vectors of shape [B, 16, width], or [1, 16, width] or [16, width] for all rows.

    Returns:
        The mean cosine similarity over the 16 queries, in -1..1, of shape [B].
    """
    return F.cosine_similarity(vectors.float(), reference.float(), dim=-1).mean(dim=-1)


def reference_rows(subjects: Sequence[Subject], count: int) -> Subject:
    """Join subjects into one with a row for each image, or with one row for all of them.

    Args:
        subjects: Subjects of one word, such as the batches of a trajectory.
        count: Number of images.

    Returns:
        A subject of ``count`` rows or of one.

    Raises:
        ValueError: The words differ, or the number of rows is neither 1 nor that of the images.
    """
    words = list(dict.fromkeys(subject.word for subject in subjects))
    if len(words) > 1:
        raise ValueError(
            f"The subjects have different words ({', '.join(words)}), and pictures are compared with one: connect "
            "subjects of one word."
        )
    first = subjects[0]
    joined = Subject(torch.cat([subject.vectors for subject in subjects]), first.word, first.encoder)
    if len(joined) not in (1, count):
        raise ValueError(
            f"There are {len(joined)} subjects for {count} pictures: connect one subject, or one for each picture."
        )
    return joined


@dataclass(frozen=True)
class Fidelity:
    """How well images show a subject.

    Args:
        likeness: For each image the likeness to the subject, in -1..1.
        agreement: For each image the likeness, asked about the prompt, to an image of the prompt alone; empty if not
            measured.
    """

    likeness: tuple[float, ...]
    agreement: tuple[float, ...] = ()

    @property
    def totals(self) -> tuple[float, ...]:
        """The numbers by which images are compared: likeness, and agreement where it was measured."""
        if not self.agreement:
            return self.likeness
        return tuple(like + agree for like, agree in zip(self.likeness, self.agreement, strict=True))

    @property
    def best(self) -> int:
        """Index of the image with the highest total, the earlier of two; one that is NaN is never better."""
        return max(range(len(self.totals)), key=lambda index: _or_lowest(self.totals[index]))

    def labels(self) -> list[str]:
        """Write a short label for each image, such as ``2: 0.83 best``."""
        columns = [self.likeness, self.agreement] if self.agreement else [self.likeness]
        rows = [" + ".join(f"{score:.3f}" for score in row) for row in zip(*columns, strict=True)]
        labels = [f"{number}: {row}" for number, row in enumerate(rows, start=1)]
        labels[self.best] += " best"
        return labels

    def describe(self, word: str) -> str:
        """Describe in words which image is best, then all scores, a line each.

        Args:
            word: The subject's word.
        """
        kind = "likeness + agreement with the prompt" if self.agreement else "likeness"
        best, count = self.best + 1, len(self.likeness)
        chosen = f'Picture {best} of {count} is best for the subject "{word}" ({kind}, at most 1 each):'
        return "\n".join([chosen, *self.labels()])


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value
