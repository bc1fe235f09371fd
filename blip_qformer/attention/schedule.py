"""Where in the schedule a model call is: told by its noise, so that it holds for samplers of any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4  # relative; samplers that reckon in log-sigma come back to a step's sigma with a rounding error


@dataclass(frozen=True)
class StepRange:
    """A part of the steps: 0 is the first, 1 behind the last. Of 50 steps, 0 to 0.4 are the first 20."""

    start: float = 0.0
    end: float = 1.0

    def covers(self, step: int, steps: int) -> bool:
        """Whether a step is inside. A part of a step counts as none, as in the references' ``int(end * steps)``."""
        return _whole(self.start * steps) <= step < _whole(self.end * steps)

    @property
    def is_empty(self) -> bool:
        return self.end <= self.start


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step a model call belongs to.

    Args:
        sigma: the noise of the call.
        sigmas: the schedule, falling, one more than there are steps. What lies between two sigmas belongs to the step
            that leads from the higher to the lower, such as the midpoint of a second-order sampler.
    """
    begun = sum(each * (1 + TOLERANCE) >= sigma for each in sigmas)
    return min(max(begun - 1, 0), max(len(sigmas) - 2, 0))


def _whole(steps: float) -> int:
    return int(steps + TOLERANCE)
