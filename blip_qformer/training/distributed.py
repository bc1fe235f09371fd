"""What the losses of a run of several processes exchange: rows of a batch, and means."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """Rows of all processes; a row's gradient goes back to the process that it came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        first = torch.distributed.get_rank() * ctx.count
        return gradient[first : first + ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes; gradients flow through.

    Args:
        rows: Rows of this process, of shape [B, ...].

    Returns:
        Rows of shape [processes * B, ...], in the order of the processes.
    """
    return _GatherRows.apply(rows) if _is_distributed() else rows


def mean_over_processes(count: Tensor) -> Tensor:
    """Average a number over all processes.

    Args:
        count: The number in this process.

    Returns:
        The mean, the same in all of them.
    """
    if not _is_distributed():
        return count
    total = count.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def process_index() -> int:
    """Return the index of this process among those that train together; 0 without others."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
