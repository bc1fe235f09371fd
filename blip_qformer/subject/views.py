"""Several views of one subject: their weighted mean, and the view that is least similar to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .blending import blend_vectors
from .subject import Subject
from .weights import normalise_weights

MIN_VIEWS = 3  # of two views, neither is less similar to the other


def average_views(views: Subject, weights: Sequence[float] = ()) -> Subject:
    """Average the rows of a subject into one.

    Args:
        views: A subject with a row for each view.
        weights: A weight for each view; without weights, all count the same.

    Returns:
        A subject of one row.

    Raises:
        ValueError: The weights cannot be used, see :func:`~blip_qformer.subject.weights.normalise_weights`.
    """
    if not weights:
        return views.average()
    return replace(views, vectors=blend_vectors(views.vectors[:, None], normalise_weights(weights, len(views))))


def view_similarity(views: Subject) -> Tensor:
    """Compute the mean cosine similarity of each view to the others.

    Args:
        views: A subject with a row for each of N >= 2 views.

    Returns:
        Similarities [N] in -1..1.
    """
    count = len(views)
    directions = rearrange(F.normalize(views.vectors, dim=-1), "view query width -> view (query width)")
    cosines = directions @ directions.T / views.vectors.shape[1]  # [N, N]
    return (cosines.sum(dim=1) - cosines.diagonal()) / (count - 1)


def describe_views(views: Subject) -> str:
    """Describe in words how many views there are and, of three or more, which is least similar to the others."""
    if len(views) < MIN_VIEWS:
        return f'"{views.word}" from {_image_count(len(views))}.'
    similarity = view_similarity(views)
    outlier = int(similarity.argmin())
    others = [value for index, value in enumerate(similarity.tolist()) if index != outlier]
    return (
        f'"{views.word}" from {_image_count(len(views))}. Picture {outlier + 1} is least like the others '
        f"(similarity {similarity[outlier]:.2f}; theirs {min(others):.2f} to {max(others):.2f})."
    )


def _image_count(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
