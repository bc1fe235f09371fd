"""Confidence intervals of measured shares and means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, sem, t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A share of successes with its 95 % interval.

    Args:
        successes: Number of successes.
        trials: Number of trials.

    Raises:
        ValueError: If there are no trials, or more successes than trials.
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
        interval = binomtest(self.successes, self.trials).proportion_ci(CONFIDENCE, method="wilson")
        return interval.low, interval.high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} .. {high:.1%})"


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval.

    Args:
        value: The mean.
        half: Half of the interval's width, NaN for a single value.
    """

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Compute a mean and its interval by Student's t distribution.

        Args:
            values: One number for each subject: several images of one subject are no independent trials.

        Returns:
            The mean with half of its 95 % interval.
        """
        numbers = np.asarray(values, dtype=float)
        if len(numbers) < 2:
            return cls(float(numbers.mean()), float("nan"))
        quantile = t.ppf((1 + CONFIDENCE) / 2, len(numbers) - 1)
        return cls(float(numbers.mean()), float(quantile * sem(numbers)))
