"""From where a thing probably is to how much of each pixel it is, and of what colour it is there.

A *trimap* is 1 where a pixel is the thing's, 0 where it is not, and 0.5 where that is unknown. Closed-form matting
(Levin, Lischinski and Weiss, 2008) fills in the unknown, and multi-level foreground estimation (Germer et al., 2020)
takes the old background out of the colours at the edges; both are pymatting's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..extras import import_extra

# CLIPSeg's masks are best when cut at about 0.4, and what is surely the thing or surely not lies well apart from that.
THRESHOLDS = (0.1, 0.6)


UNKNOWN = 0.5


SMALLEST_EDGE = 3  # of a picture: the matting's windows are so large


OPAQUE = 0.1  # from here on a pixel counts as the subject's, as in the preprocessing of masks


SURELY_OUTSIDE = 0.95  # of a picture's border no subject covers as much


class NoSubjectError(ValueError):
    """Nothing in a picture is surely the thing that was looked for."""


class MattingError(ValueError):
    """A picture whose edges cannot be found."""


def trimap_of(probability: Tensor, thresholds: tuple[float, float] = THRESHOLDS) -> Tensor:
    """Cut probabilities at two thresholds.

    Args:
        probability: [H, W] in 0..1.
        thresholds: up to the first is background, from the second on foreground.

    Returns:
        [H, W]

    Raises:
        NoSubjectError: no pixel reaches the upper threshold.
        ValueError: the thresholds are not in order.
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
    return torch.where(foreground, 1.0, torch.where(background, 0.0, UNKNOWN))


def matte(
    picture: Tensor, trimap: Tensor, longest_side: int = 512, on_step: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor]:
    """A picture and its trimap -> the thing's opacity and its own colours.

    Args:
        picture: [H, W, 3] in 0..1; ``trimap``: [H, W] of 0, 0.5 and 1.
        longest_side: larger pictures are solved at this size, in pixels, and the opacity is scaled up; the colours
            are estimated at full size in any case.
        on_step: called in each of the solver's steps; it may raise to stop it.

    Returns:
        alpha [H, W] and foreground [H, W, 3], float32.

    Raises:
        MattingError: the picture is tiny, or the system of equations has no solution.
        ValueError: pymatting is missing.
    """
    height, width = trimap.shape
    if min(height, width) < SMALLEST_EDGE:
        raise MattingError(
            f"The picture is {width} x {height} pixels, too small to cut a subject out: take a larger one."
        )
    pymatting = import_extra("pymatting", "Cutting a subject out without a mask")
    if trimap.min() > 0:  # nothing says what the background looks like
        alpha = torch.ones_like(trimap)
    elif (trimap == UNKNOWN).any():
        alpha = _solve(pymatting, picture, trimap, longest_side, on_step)
    else:
        alpha = trimap
    estimated = torch.from_numpy(pymatting.estimate_foreground_ml(picture.cpu().numpy(), alpha.cpu().numpy()))
    foreground = torch.where((alpha == 1)[..., None], picture, estimated.to(picture))  # what is opaque stays as it is
    return alpha.float(), foreground


def _solve(
    pymatting: ModuleType, picture: Tensor, trimap: Tensor, longest_side: int, on_step: Callable[[], object]
) -> Tensor:
    """Closed-form matting at a bounded size; [H, W]."""
    height, width = trimap.shape
    scale = min(1.0, longest_side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small_picture = resized(picture, *size).double().cpu().numpy()
    small = resized(trimap[..., None], *size)[..., 0]
    # A larger pixel is known where all of it is, or if none is, where most of it is.
    is_foreground, is_background = small >= min(0.999, small.max()), small <= max(0.001, small.min())
    small = torch.where(is_foreground, 1.0, torch.where(is_background, 0.0, UNKNOWN)).double().cpu().numpy()
    try:
        alpha = pymatting.estimate_alpha_cf(small_picture, small, cg_kwargs={"callback": lambda *_: on_step()})
    except ValueError as error:
        raise MattingError(f"The subject could not be cut out ({error}): paint a mask instead.") from error
    alpha = resized(torch.from_numpy(alpha).to(picture)[..., None], height, width)[..., 0]
    return torch.where(trimap == UNKNOWN, alpha, trimap).clamp(0, 1)


def check_mask(mask: Tensor) -> None:
    """Refuse, in one sentence, a mask [H, W] that marks nothing, or all but the subject.

    Raises:
        NoSubjectError: it is black everywhere, or white all along its border.
    """
    if not (mask > OPAQUE).any():
        raise NoSubjectError(
            "The mask is black everywhere, so it marks no subject: paint the subject white, or invert the mask."
        )
    border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if (border > 1 - OPAQUE).float().mean() > SURELY_OUTSIDE:
        raise NoSubjectError(
            "The mask is white all along the picture's border, so it marks the background: invert the mask."
        )


def soften(mask: Tensor, radius: float) -> Tensor:
    """Blur a mask, so that its edge is wide: about four times the radius.

    Args:
        mask: [H, W]; ``radius``: the Gaussian's standard deviation, in pixels; 0 leaves the mask as it is.

    Returns:
        [H, W]
    """
    if radius <= 0:
        return mask
    reach = math.ceil(3 * radius)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=mask.device) ** 2) / (2 * radius**2))
    kernel = kernel / kernel.sum()
    blurred = F.pad(mask[None, None].float(), (reach,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(blurred, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred[0, 0].clamp(0, 1)


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """[H, W, C] -> [height, width, C], antialiased; one that has the size already comes back as it is."""
    if picture.shape[:2] == (height, width):
        return picture
    channels_first = rearrange(picture, "h w c -> 1 c h w")
    scaled = F.interpolate(channels_first, size=(height, width), mode="bilinear", antialias=True)
    return rearrange(scaled, "1 c h w -> h w c")
