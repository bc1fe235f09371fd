"""Time two functions in turns, so that other load on the machine affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(frozen=True)
class Comparison:
    """The times of two functions that ran in turns.

    Attributes:
        ours: Seconds of each of our runs.
        peer: Seconds of the peer's run beside it.
    """

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        """Our time over the peer's for each pair of runs; below 1, ours is faster."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def ratio_of_fastest(self) -> float:
        """Our fastest run over the peer's, which other load on the machine affects least."""
        return min(self.ours) / min(self.peer)


def seconds(function: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    start = now()
    function()
    return now() - start


def seconds_per_step(function: Callable[[], Any]) -> float:
    """Return the seconds of one training step in a call that makes several, without set-up and clean-up.

    The clock is read after each step of any torch optimizer, so that peers are timed without changes.
    """
    ends: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    try:
        function()
    finally:
        handle.remove()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    pairs: int,
    timed: Callable[[Callable[[], Any]], float] = seconds,
) -> Comparison:
    """Run two functions once to warm up, then in turns; which of them goes first alternates.

    Args:
        ours: Our function.
        peer: Function to compare with.
        pairs: Number of timed runs of each.
        timed: Function that runs one of them and returns its seconds.
    """
    ours()
    peer()
    comparison = Comparison([], [])
    for pair in range(pairs):
        runs = [(ours, comparison.ours), (peer, comparison.peer)]
        for function, times in runs if pair % 2 == 0 else reversed(runs):
            times.append(timed(function))
    return comparison


def now() -> float:
    """Return the time in seconds, after the GPU has finished what was queued."""
    _wait_for_device()
    return time.perf_counter()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
