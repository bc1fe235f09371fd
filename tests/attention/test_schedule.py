"""Steps told by noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip_qformer.attention.schedule import StepRange, step_of

SIGMAS = [14.6, 7.0, 3.0, 1.2, 0.4, 0.0]


def test_a_sigma_of_the_schedule_is_its_step():
    assert [step_of(sigma, SIGMAS) for sigma in SIGMAS] == [0, 1, 2, 3, 4, 4]


@given(st.integers(0, 4), st.floats(0.01, 0.99))
def test_what_lies_between_belongs_to_the_higher(step, fraction):
    assert step_of(SIGMAS[step + 1] + fraction * (SIGMAS[step] - SIGMAS[step + 1]), SIGMAS) == step


def test_rounding_of_a_sampler_does_not_matter():
    for step, sigma in enumerate(SIGMAS[:-1]):
        assert step_of(float(torch.tensor(sigma).log().exp()) * (1 + 1e-6), SIGMAS) == step
        assert step_of(sigma * (1 - 1e-6), SIGMAS) == step


def test_sigmas_outside_belong_to_the_ends():
    assert (step_of(80.0, SIGMAS), step_of(-1.0, SIGMAS), step_of(1.0, [1.0])) == (0, 4, 0)


@pytest.mark.parametrize(
    ("start", "end", "steps", "covered"),
    [
        (0.0, 0.4, 50, range(0, 20)),
        (0.0, 0.8, 10, range(0, 8)),
        (0.2, 0.6, 10, range(2, 6)),
        (0.0, 1.0, 7, range(0, 7)),
        (0.29, 1.0, 100, range(29, 100)),  # 0.29 * 100 is a little less than 29 in floating point
        (0.0, 0.4, 4, range(0, 1)),
        (0.5, 0.5, 10, range(0)),
        (0.8, 0.2, 10, range(0)),
    ],
)
def test_a_range_covers_steps(start, end, steps, covered):
    assert [step for step in range(steps) if StepRange(start, end).covers(step, steps)] == list(covered)
    assert StepRange(start, end).is_empty is (not covered)


@pytest.mark.parametrize(
    ("end", "steps", "ours", "published"),
    [
        (0.8, 10, 8, 8),
        (0.8, 20, 16, 16),
        (0.4, 25, 10, 10),
        (0.8, 50, 40, 40),
        (0.0, 50, 0, 0),
        (1.0, 50, 50, 50),
        (0.8, 24, 19, 20),  # 19.2 and 20.0
        (0.5, 7, 3, 4),
    ],
)
def test_cross_end_counts_steps_as_self_end_does(end, steps, ours, published):
    """The published code counts cross_replace_steps in a table of steps + 1 rows, and self_replace_steps in steps.

    Both are the same here, so that a part of the steps means one thing; where it is whole steps, both codes agree.
    """
    assert sum(StepRange(0.0, end).covers(step, steps) for step in range(steps)) == ours
    assert min(int(end * (steps + 1)), steps) == published
