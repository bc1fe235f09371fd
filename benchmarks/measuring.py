"""Two things timed in turns, so that whatever else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


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


def compare(ours: Callable[[], Any], peer: Callable[[], Any], pairs: int) -> Comparison:
    """Run both once to warm up, then ``pairs`` times in turns; who goes first changes from pair to pair."""
    ours()
    peer()
    comparison = Comparison([], [])
    for pair in range(pairs):
        runs = [(ours, comparison.ours), (peer, comparison.peer)]
        for function, seconds in runs if pair % 2 == 0 else reversed(runs):
            seconds.append(_seconds(function))
    return comparison


def _seconds(function: Callable[[], Any]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    function()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    """A GPU works on after Python's call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
