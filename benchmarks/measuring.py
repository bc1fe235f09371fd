"""Two things timed in turns, so that whatever else the machine does falls on both."""

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
    """Seconds of every run; ``ours[i]`` and ``peer[i]`` ran one after the other."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, pair by pair: below 1 we are faster."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def ratio_of_fastest(self) -> float:
        """Our fastest run over the peer's: what a busy machine disturbs least."""
        return min(self.ours) / min(self.peer)


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = now()
    function()
    return now() - start


def seconds_per_step(function: Callable[[], Any]) -> float:
    """How long one step of training takes in a call that makes several; what comes before and after does not count.

    The clock is read after each step of any optimizer of torch, so that peers are timed as they are.
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
    """Run both once to warm up, then ``pairs`` times in turns; who goes first changes from pair to pair.

    Args:
        timed: runs one of them and says how long it took.
    """
    ours()
    peer()
    comparison = Comparison([], [])
    for pair in range(pairs):
        runs = [(ours, comparison.ours), (peer, comparison.peer)]
        for function, taken in runs if pair % 2 == 0 else reversed(runs):
            taken.append(timed(function))
    return comparison


def now() -> float:
    """The time in seconds, when all that was begun is done: a GPU works on after Python's call has returned."""
    _wait_for_device()
    return time.perf_counter()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
