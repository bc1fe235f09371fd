"""Write a .safetensors file tensor by tensor.

The safetensors library needs all tensors in memory before it writes. Here the most that is held is one tensor, in its
old dtype and its new one, so that a 7 GB checkpoint converts on a small machine. The format
(github.com/huggingface/safetensors): eight bytes with the length of the header, the header in JSON (name -> dtype,
shape, first and last byte), the bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import atomic_file

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write tensors of any shape and memory layout to a .safetensors file, whole or not at all.

    Args:
        path: The file to write.
        tensors: The tensors by name.
        metadata: Text by name, kept in the file's header.
        dtype: The dtype to cast floating-point tensors to; others stay as they are. None casts nothing.
        overwrite: Whether an existing file may be replaced.
        progress: A function called after each tensor with the number of bytes just written, whose sum is
            :func:`data_size`.

    Raises:
        FileExistsError: The file exists and ``overwrite`` is False.
        OSError: The disk is too full, or the folder is missing.
        ValueError: A tensor cannot be stored, or does not fit into ``dtype``.
    """
    path = Path(path)
    entries = _entries(tensors, dtype)
    header = _header(entries, metadata)
    check_target(path, overwrite=overwrite)
    check_free_space(path.parent, len(header) + sum(entry.size for entry in entries))

    with atomic_file(path) as temporary, temporary.open("xb") as file:
        file.write(header)
        for entry in entries:
            data = _stored(entry, tensors[entry.name])
            file.write(data)
            if progress is not None:
                progress(len(data))
            del data  # before the next tensor is read: two at once is what this module avoids


def data_size(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Return the number of bytes that tensors take in a file, without its header. No tensor is read.

    Args:
        tensors: The tensors by name.
        dtype: The dtype that floating-point tensors would be cast to.

    Raises:
        ValueError: A tensor cannot be stored.
    """
    return sum(entry.size for entry in _entries(tensors, dtype))


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a path at which no file may be written.

    Args:
        path: The file to be written.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: A folder is there, or a file that may not be replaced.
        FileNotFoundError: The folder of the path does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, and a file was to be written there: choose another name.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists already: choose another name, or allow overwriting it "
            "(overwrite=True; on the command line, --force)."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent} is not a folder, so {path.name} cannot be written there: create it first."
        )


def check_free_space(folder: str | os.PathLike[str], needed: int) -> None:
    """Refuse a disk with too little room.

    Args:
        folder: Any folder on that disk.
        needed: The number of bytes needed.

    Raises:
        OSError: There is too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free} bytes free and {needed} are needed: make room there or choose another disk."
        )


@dataclass(frozen=True)
class _Entry:
    """One tensor as the file will hold it; ``size`` is in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


def _entries(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[_Entry]:
    """Return the tensors in the order of the file."""
    entries = []
    for name, tensor in tensors.items():
        stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if stored not in DTYPE_NAMES:
            raise ValueError(f"The tensor {name} is {stored}, which safetensors cannot hold: cast it to another dtype.")
        if name == "__metadata__":
            raise ValueError("A tensor is named __metadata__, which safetensors keeps for itself: rename the tensor.")
        entries.append(_Entry(name, stored, tuple(tensor.shape), tensor.numel() * stored.itemsize))
    # Widest elements first: so each tensor begins at a multiple of its element size, as mapping into memory needs.
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def _header(entries: list[_Entry], metadata: Mapping[str, str] | None) -> bytes:
    """Return the beginning of the file: the header's length in eight bytes, and the header, padded to a multiple."""
    header: dict[str, dict[str, Any]] = {}
    for name, value in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(f"The metadata {name!r} is {value!r}, and safetensors holds only text: make it a str.")
    if metadata:
        header["__metadata__"] = dict(metadata)
    begin = 0
    for entry in entries:
        offsets = [begin, begin + entry.size]
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
        begin += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stored(entry: _Entry, tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order; ValueError if an element is too large for the dtype."""
    if tensor.is_floating_point() and torch.finfo(entry.dtype).max < torch.finfo(tensor.dtype).max and entry.size:
        largest = max(abs(extreme.item()) for extreme in tensor.aminmax())
        if torch.finfo(entry.dtype).max < largest < math.inf:
            raise ValueError(
                f"The tensor {entry.name} holds {largest:g}, too large for {entry.dtype}: write bfloat16 or float32."
            )
    stored = tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous()
    # Flat first: a tensor without axes cannot be seen as bytes. As bytes, because numpy knows no bfloat16.
    return stored.reshape(-1).view(torch.uint8).numpy().data
