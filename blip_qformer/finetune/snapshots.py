"""The snapshot of a fine-tuning under way: all that it needs to go on, to the last bit, after its process has died.

It is one ``.safetensors`` file, replaced whole, named by a key of everything that decides the result. So a run finds
its own snapshot or none, and other software can read what is in it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.write_safetensors import data_size, write_safetensors

SECONDS = 5.0  # between two snapshots, at least
COST = 0.05  # of the time goes into writing, at most
ASSUMED_SPEED = 500e6  # bytes a second, until one was written
KEPT, KEPT_BYTES = 3, 16 * 1024**3  # of different fine-tunings, all together
CANCELLED_BYTES = 1024**3  # whoever presses Cancel does not wait for more to be written
FORMAT = 1  # of what a snapshot holds; with another number, older snapshots are not found
CHECKSUMS = "checksums"  # key in the file's metadata

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ROW = 4096

log = logging.getLogger("blip_diffusion")


class Snapshots:
    """The snapshot of one fine-tuning. Whatever goes wrong with it is logged, and training goes on.

    Args:
        folder: Folder of snapshots; made when the first one is written.
        key: Name for everything that decides the result, fit for a file's name.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.path = folder, folder / f"{key}.safetensors"
        self._started = time.monotonic()
        self._due: float | None = None

    def load(self) -> dict[str, Tensor] | None:
        """Read the snapshot.

        Returns:
            The tensors that were saved, on the CPU; None if there is no snapshot, or a damaged one.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                checksums = json.loads(file.metadata()[CHECKSUMS])
                # Copies: a file that is mapped into memory cannot be replaced on Windows.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dictionary
            if {name: checksum(tensor) for name, tensor in tensors.items()} != checksums:
                raise ValueError("its checksums are others")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("The snapshot %s is damaged (%s): fine-tuning begins anew.", self.path, error)
            self.remove()
            return None
        return tensors

    def save_if_due(self, make_tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write a snapshot if the last one is old enough for what writing costs.

        Args:
            make_tensors: Function that returns the tensors to save, without copying the large ones.
        """
        if self._due is None:
            self._due = self._started + data_size(make_tensors()) / ASSUMED_SPEED / COST
        if time.monotonic() >= self._due:
            self.save(make_tensors())

    def save_cancelled(self, tensors: Mapping[str, Tensor]) -> None:
        """Write a last snapshot, unless it is so large that whoever cancelled would wait for it.

        Args:
            tensors: What to save.
        """
        if data_size(tensors) <= CANCELLED_BYTES:
            self.save(tensors)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write a snapshot in place of the one before.

        Args:
            tensors: What to save, on any device.
        """
        began = time.monotonic()
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_old(data_size(tensors))
            write_safetensors(self.path, tensors, metadata={CHECKSUMS: json.dumps(checksums)}, overwrite=True)
        except OSError as error:
            log.warning("No snapshot of the fine-tuning could be written (%s); it goes on without.", error)
        ended = time.monotonic()
        self._due = ended + max(SECONDS, (ended - began) / COST)

    def remove(self) -> None:
        """Remove the snapshot of a fine-tuning that is done."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("The snapshot %s could not be removed (%s): delete it by hand.", self.path, error)
        with suppress(OSError):  # there is none, or it holds others
            self.folder.rmdir()

    def _remove_old(self, size: int) -> None:
        """Remove the oldest snapshots of other fine-tunings, so that there is room for one of ``size`` bytes."""
        others = [path for path in self.folder.glob("*.safetensors") if path != self.path]
        newest_first = sorted(((path.stat(), path) for path in others), key=lambda each: -each[0].st_mtime)
        for count, (status, path) in enumerate(newest_first, 1):
            size += status.st_size
            if count >= KEPT or size > KEPT_BYTES:
                path.unlink(missing_ok=True)


def checksum(tensor: Tensor) -> int:
    """Sum up a tensor's bits on its own device, so that any one changed value, or two blocks exchanged, change the sum.

    Args:
        tensor: Tensor of any dtype and shape.
    """
    bits = tensor.detach().contiguous().flatten().view(INTEGERS[tensor.element_size()])
    whole = len(bits) // ROW * ROW
    rows = bits[:whole].view(-1, ROW).sum(dim=1, dtype=torch.int64)
    rows = torch.cat([rows, bits[whole:].sum(dtype=torch.int64)[None]])
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def snapshot_key(networks: Iterable[Mapping[str, Tensor]], tensors: Iterable[Tensor], values: Mapping[str, Any]) -> str:
    """Return a short name for everything that decides the result of a fine-tuning.

    Args:
        networks: Weights of the networks that take part.
        tensors: Images and the like, which count to the last bit.
        values: Whatever else counts, such as the settings; fit for JSON.
    """
    content = {
        "format": FORMAT,
        "networks": [_network_hash(network) for network in networks],
        "tensors": [_tensor_hash(tensor) for tensor in tensors],
        "values": dict(values),
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _network_hash(weights: Mapping[str, Tensor]) -> str:
    """Hash names, shapes and checksums, which a card sums up in milliseconds."""
    lines = [f"{name} {weight.dtype} {tuple(weight.shape)} {checksum(weight)}" for name, weight in weights.items()]
    return sha256("\n".join(lines).encode()).hexdigest()


def _tensor_hash(tensor: Tensor) -> str:
    shape = f"{tensor.dtype} {tuple(tensor.shape)} "
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return sha256(shape.encode() + data.tobytes()).hexdigest()
