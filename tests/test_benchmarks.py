"""How benchmarks measure; what they measure is nobody's test."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import measuring
from benchmarks.measuring import compare, seconds_per_step


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is half a second after the last one."""
    ticks = itertools.count()
    monkeypatch.setattr(measuring, "now", lambda: next(ticks) / 2)


def train(steps: int) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    for _ in range(steps):
        weight.sum().backward()
        optimizer.step()


def test_a_step_lasts_from_one_to_the_next(clock):
    """What comes before the first step and after the last one does not count."""
    assert seconds_per_step(lambda: (measuring.now(), train(5), measuring.now())) == 0.5
    assert measuring.now() == 0.5 * (1 + 5 + 1)
    train(3)  # nobody listens any more
    assert measuring.now() == 0.5 * (1 + 5 + 1 + 1)


def test_both_run_in_turns_after_a_warm_up(clock):
    runs = []
    found = compare(lambda: runs.append("ours"), lambda: runs.append("peer"), 2)
    assert runs == ["ours", "peer", "ours", "peer", "peer", "ours"]
    assert found.ours == found.peer == [0.5, 0.5]
    assert (found.ratio, found.ratio_of_fastest) == (1, 1)
