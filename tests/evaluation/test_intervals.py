"""Shares and means with their intervals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_qformer.evaluation.intervals import Mean, Share

Z = 1.959963984540054  # standard deviations that hold 95 % of a normal distribution


@given(st.integers(1, 500).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_the_interval_is_wilsons(counts):
    """As the formula has it: centre and half of the width of the score interval."""
    successes, n = counts
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    assert Share(successes, n).interval == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_a_share_reads_as_percent():
    assert str(Share(3, 4)) == "75.0% (30.1% .. 95.4%)"


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (5, 4), (-1, 3)])
def test_no_share_of_nothing(successes, trials):
    with pytest.raises(ValueError, match="is no share"):
        Share(successes, trials)


def test_a_mean_comes_with_its_interval():
    mean = Mean.of([1.0, 2.0, 3.0])
    assert (mean.value, mean.half) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)
    assert math.isnan(Mean.of([1.0]).half)
