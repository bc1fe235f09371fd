"""Weights that a network keeps: finite numbers, in memory of its own and not in the file they came from.

``read_tensors`` maps files. That holds nothing twice while weights are copied or cast, but a network whose weights
*are* the mapped file dies with SIGBUS when the file is written over, and Windows lets nobody replace it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from .read_tensors import CheckpointError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

CHUNK = 2**20  # numbers that are summed at once: torch casts them to float32 first, which is memory


def check_dtypes(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of a dtype that networks do not compute in. No tensor is read.

    Args:
        state_dict: The weights.
        path: The file, for the error message.

    Raises:
        CheckpointError: A tensor has another dtype; it is named.
    """
    for key, tensor in state_dict.items():
        # position_ids are 0, 1, 2, ...: no weight, only stored by older transformers
        if tensor.dtype not in DTYPES and not key.endswith("position_ids"):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f'{path} holds "{key}" in {dtype}: get the weights in float16, bfloat16 or float32.')


def check_finite(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that hold NaN or infinity. Every tensor is read.

    Args:
        state_dict: The weights.
        path: The file, for the error message.

    Raises:
        CheckpointError: A tensor holds NaN or infinity; it is named.
    """
    for key, tensor in state_dict.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(
                f'{path} holds NaN or infinity in "{key}", so its model would draw nothing but noise: download it '
                "again, or convert it anew from its source."
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether every number of a floating-point tensor is finite in float32, in which networks compute."""
    for numbers in tensor.reshape(-1).split(CHUNK):
        # One pass without a second tensor: NaN and infinity stay in a sum. A sum of finite numbers may overflow too.
        if not torch.isfinite(numbers.sum(dtype=torch.float32)) and not torch.isfinite(numbers.float()).all():
            return False
    return True


def detach_from_file(network: nn.Module, mapped: Iterable[Tensor]) -> None:
    """Copy each weight of a network that is still a mapped file's memory, one by one, so that the file can go.

    Args:
        network: A network that was loaded, by copying or by assigning.
        mapped: The tensors of the file, or views of them.
    """
    of_file = {tensor.untyped_storage().data_ptr() for tensor in mapped}
    for weight in chain(network.parameters(), network.buffers()):
        if weight.untyped_storage().data_ptr() in of_file:
            weight.data = weight.data.clone()
