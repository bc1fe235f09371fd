"""Attention in float32 while the rest of a training step on a CPU is in bfloat16.

torch's fused attention for CPUs goes backward in bfloat16 at a fifth of its float32 speed: of a step of the small model
(two cores, torch 2.13) it was more than a third, and float32 attention makes the whole step 1.3 times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def fast_attention(device: torch.device) -> AbstractContextManager:
    """Compute attention in the precision that trains fastest on a device: float32 on a CPU, its own elsewhere.

    Args:
        device: Device that trains.

    Returns:
        Context, inside which it is so; a ``step_context`` of :func:`blip_qformer.training.trainer.train`.
    """
    return _Float32Attention() if device.type == "cpu" else nullcontext()


class _Float32Attention(TorchFunctionMode):
    """Give torch's attention float32, whether diffusers' networks call it, transformers' or ours."""

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):  # which would make bfloat16 of them again
            return func(*map(_in_float32, args), **{name: _in_float32(value) for name, value in kwargs.items()})


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
