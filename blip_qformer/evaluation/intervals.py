"""How sure a measured share or mean is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.stats import t

Z_95 = 1.959964  # standard deviations that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Share:
    """A share of successes with its 95 % interval.

    Args:
        successes, trials: counts.
    """

    successes: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials or not self.trials:
            raise ValueError(f"{self.successes} of {self.trials} is no share: count at least one trial.")

    @property
    def value(self) -> float:
        """Successes over trials."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which holds near 0 and 1 as well."""
        n, p, z = self.trials, self.value, Z_95
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} .. {high:.1%})"


@dataclass(frozen=True)
class Mean:
    """A mean over things, and half of its 95 % interval by Student's t, which is no number for a single thing."""

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Pictures of one thing are no independent trials, so that each thing counts once."""
        numbers = np.asarray(values, dtype=float)
        if len(numbers) < 2:
            return cls(float(numbers.mean()), float("nan"))
        error = numbers.std(ddof=1) / len(numbers) ** 0.5
        return cls(float(numbers.mean()), float(t.ppf(0.975, len(numbers) - 1) * error))
