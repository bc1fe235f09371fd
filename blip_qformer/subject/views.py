"""Several views of one subject: their weighted mean, and the view that does not look like the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .blending import blend_vectors
from .subject import Subject
from .weights import normalise_weights

FEWEST_TO_COMPARE = 3  # of two views, neither is less like the other


def average_views(views: Subject, weights: Sequence[float] = ()) -> Subject:
    """The rows of a subject -> one row, their mean, weighted where there are weights.

    Raises:
        ValueError: the weights cannot be used, see :func:`~blip_qformer.subject.weights.normalise_weights`.
    """
    if not weights:
        return views.average()
    return replace(views, vectors=blend_vectors(views.vectors[:, None], normalise_weights(weights, len(views))))


def likeness(views: Subject) -> Tensor:
    """How much each of N >= 2 views is like the others, [N]: the mean cosine between their vectors, -1 to 1."""
    count = len(views)
    directions = rearrange(F.normalize(views.vectors, dim=-1), "view query width -> view (query width)")
    cosines = directions @ directions.T / views.vectors.shape[1]  # [N, N]
    return (cosines.sum(dim=1) - cosines.diagonal()) / (count - 1)


def describe_views(views: Subject) -> str:
    """In words, which view is least like the others, where there are enough to say."""
    if len(views) < FEWEST_TO_COMPARE:
        return f'"{views.word}" from {_pictures(len(views))}.'
    alike = likeness(views)
    odd = int(alike.argmin())
    others = [value for index, value in enumerate(alike.tolist()) if index != odd]
    return (
        f'"{views.word}" from {_pictures(len(views))}. Picture {odd + 1} is least like the others '
        f"(similarity {alike[odd]:.2f}; theirs {min(others):.2f} to {max(others):.2f})."
    )


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
