"""Blend weights: parsed from text, normalised, and computed from positions on a slider or in a square."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

SEPARATORS = re.compile(r"[\s,;,]+")
SMALLEST_SUM = 0.01  # of the largest weight: below it, normalising blows the vectors up a hundredfold and more


def parse_weights(text: str) -> list[float]:
    """Parse ``"1, 2, 0.5"`` as [1.0, 2.0, 0.5], and an empty text as no weights.

    Args:
        text: Numbers with commas, semicolons or spaces between them.

    Returns:
        The numbers in order.

    Raises:
        ValueError: Something in the text is no number.
    """
    weights = []
    for number in filter(None, SEPARATORS.split(text)):
        try:
            weights.append(float(number))
        except ValueError:
            raise ValueError(
                f'The weights "{text}" hold "{number}", which is no number: write numbers with commas between them, '
                "such as 1, 2, 0.5."
            ) from None
    return weights


def normalise_weights(weights: Sequence[float], count: int) -> list[float]:
    """Scale weights so that they sum to 1. Negative ones are kept: they extrapolate.

    Args:
        weights: Weights with a positive sum.
        count: The number of subjects or views that are weighted.

    Returns:
        The scaled weights, in the same order.

    Raises:
        ValueError: The number of weights is wrong, one is NaN or infinite, or their sum is not clearly positive.
    """
    written = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ValueError(
            f"There are {len(weights)} weights ({written}) for {count} subjects or views: write one for each."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"The weights {written} hold NaN or infinity: write finite numbers.")
    largest = max(abs(weight) for weight in weights)
    if largest == 0:
        raise ValueError(f"The weights {written} are all zero, so nothing is left: make at least one positive.")
    scaled = [weight / largest for weight in weights]  # a sum of huge weights would be infinite
    total = math.fsum(scaled)
    if total < SMALLEST_SUM:
        raise ValueError(
            f"The weights {written} sum to {total * largest:g}, but a clearly positive sum is needed to normalise "
            "them: make the positive ones larger."
        )
    return [weight / total for weight in scaled]


def bilinear_weights(x: float, y: float) -> tuple[float, float, float, float]:
    """Compute the weights of a square's corners, top left, top right, bottom left and bottom right.

    Args:
        x: The position from left to right, in 0..1.
        y: The position from top to bottom, in 0..1.

    Returns:
        A weight for each corner; they sum to 1.
    """
    return (1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y


def slider_weights(count: int, x: float, y: float = 0.0) -> tuple[float, ...]:
    """Compute the weights of two, three or four subjects at one position of the sliders.

    Two are at the ends of x and leave y unused; four are at the corners of the square; with three, x goes from the
    first to the second and y from there to the third: the square's two lower corners are one.

    Args:
        count: The number of subjects.
        x: The position of the first slider, in 0..1; outside it extrapolates.
        y: The position of the second slider, likewise.

    Returns:
        A weight for each subject; they sum to 1.

    Raises:
        ValueError: There are fewer than two or more than four subjects.
    """
    if count == 2:
        return 1 - x, x
    if count == 3:
        return (1 - x) * (1 - y), x * (1 - y), y
    if count == 4:
        return bilinear_weights(x, y)
    raise ValueError(f"The sliders blend two to four subjects, not {count}: write the weights instead.")


def trajectory_positions(count: int, steps: int) -> list[tuple[float, ...]]:
    """Compute the slider positions of a trajectory.

    Args:
        count: The number of subjects, two or four.
        steps: The number of positions from one subject to the next, both ends included.

    Returns:
        ``steps`` positions (x,) between two subjects, or ``steps`` rows of as many positions (x, y) among four.

    Raises:
        ValueError: There are neither two nor four subjects, or fewer than two steps.
    """
    if count not in (2, 4):
        raise ValueError(
            f"A trajectory is a line between two subjects or a square among four, but there are {count}: connect two "
            "or four."
        )
    if steps < 2:
        raise ValueError(f"A trajectory of {steps} steps has no two ends: give it at least 2.")
    line = [step / (steps - 1) for step in range(steps)]  # exactly 0 and 1 at the ends
    return [(x,) for x in line] if count == 2 else [(x, y) for y in line for x in line]


def trajectory_labels(count: int, steps: int) -> list[str]:
    """Write where each step of a trajectory lies, as ``x 0.25`` or ``x 0.25, y 0.50``.

    Args:
        count: Number of subjects, two or four.
        steps: Number of steps along the line, or along each side of the square.

    Returns:
        A label for each step.
    """
    return [
        ", ".join(f"{axis} {value:.2f}" for axis, value in zip("xy", position, strict=False))
        for position in trajectory_positions(count, steps)
    ]
