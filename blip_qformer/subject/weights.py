"""Blend weights: how a person writes them, what they must be, and where on a slider or in a square they lie."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

SEPARATORS = re.compile(r"[\s,;,]+")
SMALLEST_SUM = 0.01  # of the largest weight: below it, normalising blows the vectors up a hundredfold and more


def parse_weights(text: str) -> list[float]:
    """``"1, 2, 0.5"`` -> [1.0, 2.0, 0.5]; an empty text is no weights at all.

    Raises:
        ValueError: something in it is no number.
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
    """Any weights with a positive sum -> weights that sum to 1. Negative ones are kept: they extrapolate.

    Args:
        count: how many things are weighted.

    Raises:
        ValueError: the wrong number of weights, NaN or infinity among them, or a sum that is not clearly positive.
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
    """Weights of a square's corners, top left, top right, bottom left, bottom right, at x to the right and y down."""
    return (1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y


def slider_weights(count: int, x: float, y: float = 0.0) -> tuple[float, ...]:
    """Weights of two, three or four subjects at one place of the sliders.

    Two lie at the ends of x and leave y unused; four lie at the corners of the square; with three, x goes from the
    first to the second and y from there to the third: the square's two lower corners are one.

    Raises:
        ValueError: another number of subjects.
    """
    if count == 2:
        return 1 - x, x
    if count == 3:
        return (1 - x) * (1 - y), x * (1 - y), y
    if count == 4:
        return bilinear_weights(x, y)
    raise ValueError(f"The sliders blend two to four subjects, not {count}: write the weights instead.")


def trajectory_positions(count: int, steps: int) -> list[tuple[float, ...]]:
    """Where a trajectory stops: ``steps`` places (x,) between two subjects, or ``steps`` rows of as many places (x, y)
    among four.

    Raises:
        ValueError: neither two nor four subjects, or fewer than two steps.
    """
    if count not in (2, 4):
        raise ValueError(
            f"A trajectory is a line between two subjects or a square among four, but there are {count}: connect two "
            "or four."
        )
    if steps < 2:
        raise ValueError(f"A trajectory of {steps} steps has no two ends: give it at least 2.")
    places = [step / (steps - 1) for step in range(steps)]  # exactly 0 and 1 at the ends
    return [(x,) for x in places] if count == 2 else [(x, y) for y in places for x in places]
