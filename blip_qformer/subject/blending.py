"""Blend subjects: between them, among several, and beyond them (arXiv 2305.14720, section 4 and appendix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .preview import join_previews
from .subject import Subject
from .weights import normalise_weights, slider_weights, trajectory_positions

BlendMode = Literal["linear", "spherical", "norm-preserving"]
BLEND_MODES: tuple[str, ...] = get_args(BlendMode)

MAX_ITERATIONS = 100  # for a mean on the sphere; 10 to 30 are enough for directions in one hemisphere
TOLERANCE = 1e-10
MIN_SINE = 1e-9  # of an angle that has a direction


def blend(subjects: Sequence[Subject], weights: Sequence[float], mode: BlendMode = "linear", word: str = "") -> Subject:
    """Blend several subjects into one, between them or beyond.

    Args:
        subjects: Subjects of one encoder, each of N rows or of one row that serves all N.
        weights: A weight for each subject, of any positive sum. A subject with all the weight is returned bit by bit.
        mode: The kind of mean, see :func:`blend_vectors`.
        word: The word for the blend; that of the heaviest subject if empty.

    Returns:
        A subject of N rows.

    Raises:
        ValueError: The weights or the mode cannot be used, or the subjects do not fit each other.
    """
    check_same_encoder(subjects)
    normalised = normalise_weights(weights, len(subjects))
    vectors = blend_vectors(_same_rows(subjects), normalised, mode)
    heaviest = max(range(len(subjects)), key=lambda index: normalised[index])
    used = [subject for subject, weight in zip(subjects, normalised, strict=True) if weight]
    preview = join_previews([subject.preview for subject in used])
    chosen_word = word.strip() or subjects[heaviest].word
    return Subject(vectors, chosen_word, _first_encoder(subjects), join_sources(used), preview)


def trajectory(subjects: Sequence[Subject], steps: int, mode: BlendMode = "linear", word: str = "") -> Subject:
    """Blend along the line between two subjects, or over the square among four.

    Args:
        subjects: Two or four subjects of one row; four are top left, top right, bottom left and bottom right.
        steps: The number of blends along the line, both ends included, or along each side of the square.
        mode: The kind of mean, see :func:`blend_vectors`.
        word: The word for all blends; that of the first subject if empty.

    Returns:
        A subject with a row for each blend; those of a square go from left to right and then from top to bottom.

    Raises:
        ValueError: As for :func:`blend`; or the number of subjects, of their rows or of steps cannot be used.
    """
    check_same_encoder(subjects)
    positions = trajectory_positions(len(subjects), steps)
    for number, subject in enumerate(subjects, start=1):
        if len(subject) != 1:
            raise ValueError(
                f'subject_{number}, "{subject.word}", has {len(subject)} rows, but a trajectory goes between single '
                'subjects: encode it as "one subject".'
            )
    weights = [normalise_weights(slider_weights(len(subjects), *position), len(subjects)) for position in positions]
    rows = _same_rows(subjects)
    vectors = torch.cat([blend_vectors(rows, each, mode) for each in weights])
    preview = join_previews([subject.preview for subject in subjects])
    chosen_word = word.strip() or subjects[0].word
    return Subject(vectors, chosen_word, _first_encoder(subjects), join_sources(subjects), preview)


def blend_vectors(vectors: Sequence[Tensor] | Tensor, weights: Sequence[float], mode: BlendMode = "linear") -> Tensor:
    """Compute the weighted mean of vectors, in float64 and independent of their order.

    Args:
        vectors: S tensors [N, 16, 768].
        weights: S weights that sum to 1.
        mode: ``linear`` is the weighted mean, as in the authors' code. ``spherical`` is the mean on the sphere of the
            directions: slerp (Shoemake 1985) for two vectors, the Karcher mean for more. ``norm-preserving`` is the
            direction of the linear mean. The last two interpolate norms linearly, where a linear mean is shorter than
            the vectors.

    Returns:
        Vectors [N, 16, 768].

    Raises:
        ValueError: There is no such mode.
    """
    if mode not in BLEND_MODES:
        raise ValueError(f'There is no blend mode "{mode}": choose one of {", ".join(BLEND_MODES)}.')
    used = [(each, weight) for each, weight in zip(vectors, weights, strict=True) if weight]
    if len(used) == 1:
        return used[0][0]  # unchanged: the last bit may differ after arithmetic
    stacked = torch.stack([each.double() for each, _ in used])  # [S, N, 16, 768]
    weight = stacked.new_tensor([weight for _, weight in used])  # [S]
    mean = torch.einsum("s, snqw -> nqw", weight, stacked)
    if mode != "linear":
        # Extrapolated from a long subject beyond a short one, a norm would become negative and flip the vector.
        norm = torch.einsum("s, snqw -> nqw", weight, stacked.norm(dim=-1, keepdim=True)).clamp_min(0)  # [N, 16, 1]
        direction = _spherical_mean(F.normalize(stacked, dim=-1), weight) if mode == "spherical" else mean
        mean = F.normalize(direction, dim=-1) * norm
    return mean.to(vectors[0].dtype)


def is_extrapolation(weights: Sequence[float]) -> bool:
    """Return whether a blend lies beyond the subjects.

    Args:
        weights: Weights of the blend.

    Returns:
        Whether a weight is negative.
    """
    return any(weight < 0 for weight in weights)


def describe_blend(subjects: Sequence[Subject], weights: Sequence[float], mode: BlendMode, blended: Subject) -> str:
    """Describe in words what was blended.

    Args:
        subjects: The subjects.
        weights: Weights of the subjects, of any positive sum.
        mode: The kind of mean.
        blended: The result.

    Returns:
        A sentence with each subject's share in per cent.
    """
    shares = [
        f'{weight:.0%} "{subject.word}" (subject_{number})'
        for number, (subject, weight) in enumerate(
            zip(subjects, normalise_weights(weights, len(subjects)), strict=True), start=1
        )
    ]
    kind = f"Extrapolation ({mode}), beyond the subjects" if is_extrapolation(weights) else f"Blend ({mode})"
    return f'{kind}: {" + ".join(shares)}, for the word "{blended.word}".'


def check_same_encoder(subjects: Sequence[Subject]) -> None:
    """Refuse subjects of different encoders, whose vectors mean different things. An unknown encoder fits any other.

    Args:
        subjects: The subjects.

    Raises:
        ValueError: Two subjects name different encoders.
    """
    known = [(number, subject) for number, subject in enumerate(subjects, start=1) if subject.encoder]
    for number, subject in known[1:]:
        first_number, first = known[0]
        if subject.encoder != first.encoder:
            raise ValueError(
                f'subject_{first_number}, "{first.word}", was made by the encoder {first.encoder} and '
                f'subject_{number}, "{subject.word}", by {subject.encoder}, so their vectors mean different things: '
                "encode both with one Q-Former."
            )


def join_sources(subjects: Sequence[Subject]) -> str:
    """Join the image hashes of several subjects, each once: ``12ab+34cd``.

    Args:
        subjects: The subjects; one without a hash adds nothing.

    Returns:
        The hashes with ``+`` between them.
    """
    return "+".join(dict.fromkeys(subject.source for subject in subjects if subject.source))


def _first_encoder(subjects: Sequence[Subject]) -> str:
    """Return the first encoder that is known, or an empty text."""
    return next((subject.encoder for subject in subjects if subject.encoder), "")


def _same_rows(subjects: Sequence[Subject]) -> list[Tensor]:
    """Return the subjects' vectors, single rows expanded to the number of rows of the others.

    Raises:
        ValueError: The vectors have different sizes, or the numbers of rows do not fit each other.
    """
    shapes = {tuple(subject.vectors.shape[1:]) for subject in subjects}
    if len(shapes) > 1:
        sizes = " and ".join(f"{count} x {width}" for count, width in sorted(shapes))
        raise ValueError(
            f"The subjects have vectors of {sizes} numbers, which do not blend: encode all with one Q-Former."
        )
    rows = max(len(subject) for subject in subjects)
    for number, subject in enumerate(subjects, start=1):
        if len(subject) not in (1, rows):
            raise ValueError(
                f'subject_{number}, "{subject.word}", has {len(subject)} rows and another subject {rows}: give each '
                f"one row or {rows}."
            )
    return [subject.vectors.expand(rows, -1, -1) for subject in subjects]


def _spherical_mean(directions: Tensor, weight: Tensor) -> Tensor:
    """Compute the weighted mean of unit vectors on the sphere.

    The positive weights have their Karcher mean, the point at which the weighted log maps of all directions sum to zero
    (Karcher 1977, "Riemannian center of mass and mollifier smoothing"); for two it lies on the great circle between
    them, as slerp does. From there, negative weights lead away from their directions. The mean lies in the span of the
    S vectors, so points and tangents are S coefficients instead of 768 numbers.

    Args:
        directions: Unit vectors [S, N, 16, 768].
        weight: Weights [S] that sum to 1.

    Returns:
        Unit vectors [N, 16, 768].
    """
    gram = torch.einsum("snqw, rnqw -> nqsr", directions, directions)
    positive, negative = weight.clamp_min(0), weight.clamp_max(0)
    mean = _normalise(gram, positive.expand(gram.shape[:-1]))  # [N, 16, S]
    positive = positive / positive.sum()
    for _ in range(MAX_ITERATIONS):
        step = _log_map(gram, mean, positive)
        mean = _exp_map(gram, mean, step)
        if _norm(gram, step).max() < TOLERANCE:
            break
    mean = _exp_map(gram, mean, _log_map(gram, mean, negative))
    return torch.einsum("nqs, snqw -> nqw", mean, directions)


def _log_map(gram: Tensor, point: Tensor, weight: Tensor) -> Tensor:
    """Sum the weighted log maps of all directions at a point, which gives a tangent; coefficients [N, 16, S]."""
    cosine = _inner_products(gram, point).clamp(-1, 1)
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    # A direction at the point itself has a log map of zero, and an opposite one has none.
    scale = weight * torch.where(sine > MIN_SINE, cosine.acos() / sine.clamp_min(MIN_SINE), 1.0)
    return scale - (scale * cosine).sum(dim=-1, keepdim=True) * point


def _exp_map(gram: Tensor, point: Tensor, tangent: Tensor) -> Tensor:
    """Return the point of the sphere at the end of a tangent; coefficients [N, 16, S]."""
    length = _norm(gram, tangent)
    return _normalise(gram, point * length.cos() + tangent * torch.sinc(length / torch.pi))


def _normalise(gram: Tensor, coefficients: Tensor) -> Tensor:
    """Return the coefficients [N, 16, S] of the unit vector; zeros if opposite directions cancel."""
    length = _norm(gram, coefficients)
    return torch.where(length > MIN_SINE, coefficients / length.clamp_min(MIN_SINE), 0.0)


def _norm(gram: Tensor, coefficients: Tensor) -> Tensor:
    """Return the norm [N, 16, 1] of a combination of directions."""
    return (coefficients * _inner_products(gram, coefficients)).sum(dim=-1, keepdim=True).clamp_min(0).sqrt()


def _inner_products(gram: Tensor, coefficients: Tensor) -> Tensor:
    """Return the inner product [N, 16, S] of every direction with a combination of them."""
    return (gram @ coefficients[..., None])[..., 0]
