"""Metrics of training, averaged over steps and processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor


class MetricAverager:
    """Averages losses over the batches since it last did and over all processes, and measures the speed.

    Args:
        accelerator: Accelerator of this process.
        batch_size: Pairs in a batch of this process.
    """

    def __init__(self, accelerator: Accelerator, batch_size: int):
        self._accelerator = accelerator
        self._pairs_in_batch = batch_size * accelerator.num_processes
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that something else needs out of the speed."""
        begun = time.monotonic()
        yield
        self._since += time.monotonic() - begun

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one batch.

        Args:
            losses: Scalars by name, the same names each time.
        """
        self._count += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def reduce(self) -> dict[str, float]:
        """Average, and begin anew; all processes do it together.

        Returns:
            The averages by name, and ``samples_per_second``.
        """
        sums = cast(Tensor, self._accelerator.reduce(torch.stack([*self._sums.values()]), "mean"))
        averages = dict(zip(self._sums, (sums / self._count).tolist(), strict=True))
        speed = self._count * self._pairs_in_batch / (time.monotonic() - self._since)
        self._begin()
        return {**averages, "samples_per_second": speed}
