"""Matting: from where a subject probably is to its opacity and its own colour in each pixel.

A trimap is 1 where a pixel surely belongs to the subject, 0 where it surely does not, and 0.5 where that is unknown.
Closed-form matting (Levin, Lischinski and Weiss, IEEE TPAMI 30, 2008) fills in the unknown, and multi-level foreground
estimation (Germer et al., arXiv 2006.14970) removes the old background from the colours at the edges. The package
pymatting computes both.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..extras import import_extra
from .masks import NoSubjectError
from .resizing import resize

# CLIPSeg's masks are best when cut at about 0.4; what surely belongs to the subject or surely does not is well apart.
THRESHOLDS = (0.1, 0.6)
UNKNOWN = 0.5
MIN_EDGE = 3  # of an image, in pixels: the windows of closed-form matting are so large


class MattingError(ValueError):
    """The subject of an image cannot be cut out."""


def make_trimap(probability: Tensor, thresholds: tuple[float, float] = THRESHOLDS) -> Tensor:
    """Cut probabilities at two thresholds.

    Args:
        probability: The probability of the subject, of shape [H, W] in 0..1.
        thresholds: Up to the first a pixel is background, from the second on foreground.

    Returns:
        A trimap of shape [H, W].

    Raises:
        NoSubjectError: If no pixel reaches the upper threshold.
        ValueError: If the thresholds are not in order.
    """
    lower, upper = thresholds
    if not lower < upper:
        raise ValueError(
            f"The background's threshold {lower:.2f} is not below the subject's {upper:.2f}: lower the one, or raise "
            "the other."
        )
    foreground, background = probability >= upper, probability <= lower
    if not foreground.any():
        raise NoSubjectError(
            f"No subject was found: its probability is {probability.max():.2f} at most, and {upper:.2f} is "
            "needed: use another word or a lower threshold, or paint a mask."
        )
    return _trimap(foreground, background)


def matte(
    image: Tensor, trimap: Tensor, longest_side: int = 512, on_step: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Compute a subject's opacity and its own colours.

    Args:
        image: An image of shape [H, W, 3] in 0..1.
        trimap: The image's trimap, of shape [H, W].
        longest_side: Larger images are solved at this size, in pixels, and the opacity is scaled up; the colours are
            estimated at full size in any case.
        on_step: Called in each step of the solver; may raise to stop it.

    Returns:
        The opacity of shape [H, W] and the colours of shape [H, W, 3], float32.

    Raises:
        MattingError: If the image is tiny, or the system of equations has no solution.
        ValueError: If pymatting is missing.
    """
    height, width = trimap.shape
    if min(height, width) < MIN_EDGE:
        raise MattingError(
            f"The picture is {width} x {height} pixels, too small to cut a subject out: take a larger one."
        )
    pymatting = import_extra("pymatting", "Cutting a subject out without a mask")
    if trimap.min() > 0:  # nothing says what the background looks like
        alpha = torch.ones_like(trimap)
    elif (trimap == UNKNOWN).any():
        alpha = _solve(pymatting, image, trimap, longest_side, on_step)
    else:
        alpha = trimap
    estimated = torch.from_numpy(pymatting.estimate_foreground_ml(image.cpu().numpy(), alpha.cpu().numpy()))
    foreground = torch.where((alpha == 1)[..., None], image, estimated.to(image))  # what is opaque stays as it is
    return alpha.float(), foreground


def _solve(
    pymatting: ModuleType, image: Tensor, trimap: Tensor, longest_side: int, on_step: Callable[[], object]
) -> Tensor:
    """Closed-form matting at a bounded size, [H, W]."""
    height, width = trimap.shape
    scale = min(1.0, longest_side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small_image = resize(image, *size).double().cpu().numpy()
    small_trimap = resize(trimap[..., None], *size)[..., 0]
    # A larger pixel is known where all of it is, or if none is, where most of it is.
    foreground = small_trimap >= min(0.999, float(small_trimap.max()))
    background = small_trimap <= max(0.001, float(small_trimap.min()))
    small_trimap = _trimap(foreground, background).double().cpu().numpy()
    try:
        alpha = pymatting.estimate_alpha_cf(small_image, small_trimap, cg_kwargs={"callback": lambda *_: on_step()})
    except ValueError as error:
        raise MattingError(f"The subject could not be cut out ({error}): paint a mask instead.") from error
    alpha = resize(torch.from_numpy(alpha).to(image)[..., None], height, width)[..., 0]
    return torch.where(trimap == UNKNOWN, alpha, trimap).clamp(0, 1)


def _trimap(foreground: Tensor, background: Tensor) -> Tensor:
    return torch.where(foreground, 1.0, torch.where(background, 0.0, UNKNOWN))
