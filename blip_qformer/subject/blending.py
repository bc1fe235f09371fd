"""Blending subjects: between them, among several, and beyond them (arXiv 2305.14720, section 4 and appendix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .subject import Subject
from .weights import normalise_weights, slider_weights, trajectory_positions

BlendMode = Literal["linear", "spherical", "norm-preserving"]
BLEND_MODES: tuple[str, ...] = get_args(BlendMode)

MOST_STEPS = 100  # of the search for a mean on the sphere; ten to thirty are enough for directions of one hemisphere
SMALLEST_STEP = 1e-10
SMALLEST_ANGLE = 1e-9


def blend(subjects: Sequence[Subject], weights: Sequence[float], mode: BlendMode = "linear", word: str = "") -> Subject:
    """Several subjects -> one, somewhere between them or beyond.

    Args:
        subjects: of one encoder; each of N rows, or of one that serves all N.
        weights: one a subject, of any positive sum. A subject that has all the weight comes back bit by bit.
        mode: see :func:`blend_vectors`.
        word: the word for the blend; empty: the heaviest subject's.

    Raises:
        ValueError: the weights or the mode cannot be used, or the subjects do not fit each other.
    """
    check_same_encoder(subjects)
    normalised = normalise_weights(weights, len(subjects))
    vectors = blend_vectors(_same_rows(subjects), normalised, mode)
    heaviest = max(range(len(subjects)), key=lambda index: normalised[index])
    used = [subject for subject, weight in zip(subjects, normalised, strict=True) if weight]
    return Subject(vectors, word.strip() or subjects[heaviest].word, _first(subjects, "encoder"), joined_sources(used))


def trajectory(subjects: Sequence[Subject], steps: int, mode: BlendMode = "linear", word: str = "") -> Subject:
    """The way from one subject to another, or the square among four, as one subject with a row for each step.

    Args:
        subjects: two or four of one row; four are top left, top right, bottom left and bottom right.
        steps: places along the line, both ends included, or along each side of the square, row after row.
        word: the word for all of it; empty: the first subject's.

    Raises:
        ValueError: as for :func:`blend`; or another number of subjects or of their rows, or fewer than two steps.
    """
    check_same_encoder(subjects)
    places = trajectory_positions(len(subjects), steps)
    for number, subject in enumerate(subjects, start=1):
        if len(subject) != 1:
            raise ValueError(
                f'subject_{number}, "{subject.word}", has {len(subject)} rows, but a trajectory goes between single '
                'subjects: encode it as "one subject".'
            )
    blends = [blend(subjects, slider_weights(len(subjects), *place), mode) for place in places]
    vectors = torch.cat([each.vectors for each in blends])
    return Subject(vectors, word.strip() or subjects[0].word, _first(subjects, "encoder"), joined_sources(subjects))


def blend_vectors(vectors: Sequence[Tensor], weights: Sequence[float], mode: BlendMode = "linear") -> Tensor:
    """The mathematics of :func:`blend`: S tensors [N, 16, 768] and weights that sum to 1 -> [N, 16, 768].

    Args:
        mode: ``linear``, the weighted mean, as the authors do; ``spherical``, each vector on the shortest way between
            the directions, slerp for two and the same mean for more; ``norm-preserving``, the direction of the linear
            mean. The last two let the norms go linearly, where a linear mean is shorter than what it is made of. All
            work in float64 and do not depend on the order.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in BLEND_MODES:
        raise ValueError(f'There is no blend mode "{mode}": choose one of {", ".join(BLEND_MODES)}.')
    used = [(each, weight) for each, weight in zip(vectors, weights, strict=True) if weight]
    if len(used) == 1:
        return used[0][0]  # as it is: what comes out of arithmetic may differ in the last bit
    stacked = torch.stack([each.double() for each, _ in used])  # [S, N, 16, 768]
    weight = stacked.new_tensor([weight for _, weight in used])
    mean = torch.einsum("s, snqw -> nqw", weight, stacked)
    if mode != "linear":
        # Beyond a short subject and away from a long one a norm would become negative, and the vector turn round.
        norm = torch.einsum("s, snqw -> nqw", weight, stacked.norm(dim=-1, keepdim=True)).clamp_min(0)
        direction = _spherical_mean(F.normalize(stacked, dim=-1), weight) if mode == "spherical" else mean
        mean = F.normalize(direction, dim=-1) * norm
    return mean.to(vectors[0].dtype)


def is_extrapolation(weights: Sequence[float]) -> bool:
    """Whether a blend lies beyond what it is made of."""
    return any(weight < 0 for weight in weights)


def describe_blend(subjects: Sequence[Subject], weights: Sequence[float], mode: BlendMode, blended: Subject) -> str:
    """In words, what was blended with which weights."""
    shares = [
        f'{weight:.0%} "{subject.word}" (subject_{number})'
        for number, (subject, weight) in enumerate(
            zip(subjects, normalise_weights(weights, len(subjects)), strict=True), start=1
        )
    ]
    kind = f"Extrapolation ({mode}), beyond the subjects" if is_extrapolation(weights) else f"Blend ({mode})"
    return f'{kind}: {" + ".join(shares)}, for the word "{blended.word}".'


def check_same_encoder(subjects: Sequence[Subject]) -> None:
    """Refuse subjects whose vectors mean different things. One of which the encoder is not known may be anyone's.

    Raises:
        ValueError: two subjects name different encoders.
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


def joined_sources(subjects: Sequence[Subject]) -> str:
    """The pictures behind several subjects, each once: ``12ab+34cd``."""
    return "+".join(dict.fromkeys(subject.source for subject in subjects if subject.source))


def _spherical_mean(directions: Tensor, weight: Tensor) -> Tensor:
    """Unit vectors [S, N, 16, 768] and weights that sum to 1 -> [N, 16, 768], their mean on the sphere.

    The positive weights have their Karcher mean, the point from which the weighted ways to all cancel (Karcher 1977);
    for two it lies on the great circle between them, where slerp puts it. From there negative weights lead away from
    theirs. All of this happens in the span of the S vectors, so that S coefficients are searched and not 768 numbers.
    """
    gram = torch.einsum("snqw, rnqw -> nqsr", directions, directions)
    towards, away = weight.clamp_min(0), weight.clamp_max(0)
    mean = _to_unit(gram, towards.expand(gram.shape[:-1]))  # [N, 16, S]
    towards = towards / towards.sum()
    for _ in range(MOST_STEPS):
        step = _way(gram, mean, towards)
        mean = _walk(gram, mean, step)
        if _length(gram, step).max() < SMALLEST_STEP:
            break
    mean = _walk(gram, mean, _way(gram, mean, away))
    return torch.einsum("nqs, snqw -> nqw", mean, directions)


def _way(gram: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of the ways on the sphere from ``start`` to each direction; all as coefficients [N, 16, S]."""
    cosine = _apply(gram, start).clamp(-1, 1)
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    # A direction at hand is no way off, and one straight opposite has no one way to it.
    pull = weight * torch.where(sine > SMALLEST_ANGLE, cosine.acos() / sine.clamp_min(SMALLEST_ANGLE), 1.0)
    return pull - (pull * cosine).sum(dim=-1, keepdim=True) * start


def _walk(gram: Tensor, start: Tensor, way: Tensor) -> Tensor:
    """Where one arrives on the sphere."""
    length = _length(gram, way)
    return _to_unit(gram, start * length.cos() + way * torch.sinc(length / torch.pi))


def _to_unit(gram: Tensor, coefficients: Tensor) -> Tensor:
    """The coefficients of the unit vector; nothing where opposite directions cancel."""
    length = _length(gram, coefficients)
    return torch.where(length > SMALLEST_ANGLE, coefficients / length.clamp_min(SMALLEST_ANGLE), 0.0)


def _length(gram: Tensor, coefficients: Tensor) -> Tensor:
    """[N, 16, 1]"""
    return (coefficients * _apply(gram, coefficients)).sum(dim=-1, keepdim=True).clamp_min(0).sqrt()


def _apply(gram: Tensor, coefficients: Tensor) -> Tensor:
    """The scalar product of every direction with a combination of them, [N, 16, S]."""
    return (gram @ coefficients[..., None])[..., 0]


def _same_rows(subjects: Sequence[Subject]) -> list[Tensor]:
    """The subjects' vectors, one row repeated for those that have several.

    Raises:
        ValueError: their vectors have different sizes, or their rows neither one nor one common number.
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


def _first(subjects: Sequence[Subject], name: str) -> str:
    return next((getattr(subject, name) for subject in subjects if getattr(subject, name)), "")
