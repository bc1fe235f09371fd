"""The step that a model call belongs to: told by its sigma, so that it holds for samplers of any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4  # relative; samplers that compute in log-sigma come back to a step's sigma with a rounding error


@dataclass(frozen=True)
class StepRange:
    """A range of the schedule in fractions of it. Of 50 steps, 0 to 0.4 are the first 20.

    Args:
        start: Start of the range; 0 is before the first step.
        end: End of the range; 1 is behind the last step.
    """

    start: float = 0.0
    end: float = 1.0

    def covers(self, step: int, num_steps: int) -> bool:
        """Whether a step is inside; a fraction of a step counts as none, as in ``int(end * num_steps)``.

        Args:
            step: Number of the step, from 0 on.
            num_steps: Number of all steps.
        """
        return _floor(self.start * num_steps) <= step < _floor(self.end * num_steps)

    @property
    def is_empty(self) -> bool:
        """Whether no step can be inside."""
        return self.end <= self.start


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Find the step that a model call belongs to.

    Args:
        sigma: The noise level of the call.
        sigmas: The falling schedule, one number longer than there are steps. What lies between two sigmas, such as the
            midpoint of a second-order sampler, belongs to the step that leads from the higher to the lower.

    Returns:
        Number of the step, from 0 on.
    """
    reached = sum(each * (1 + TOLERANCE) >= sigma for each in sigmas)
    return min(max(reached - 1, 0), max(len(sigmas) - 2, 0))


def _floor(steps: float) -> int:
    return int(steps + TOLERANCE)
