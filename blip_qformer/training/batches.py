"""The batches of a run: which pairs come when, and the seed of each."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.collate import Batch
from ..data.stream import PairStream
from .config import RunConfig
from .stages.base import CollateFn


def pair_stream(config: RunConfig, accelerator: Accelerator, done: int, allow: Collection[str] = ()) -> PairStream:
    """Make the stream of this process's pairs.

    Args:
        config: Settings of the run.
        accelerator: Accelerator of this process.
        done: Steps that were done, whose pairs are skipped.
        allow: What the sources of pairs may do besides reading files.

    Returns:
        Dataset of pairs without end.
    """
    return PairStream(
        list(config.pairs),
        seed=config.seed,
        process_index=accelerator.process_index,
        process_count=accelerator.num_processes,
        skip=done * config.gradient_accumulation * config.batch_size,
        batch_size=config.batch_size,
        shuffle_buffer=config.shuffle_buffer,
        allow=allow,
    )


def seeded_batches(
    config: RunConfig, accelerator: Accelerator, stream: PairStream, collate_fn: CollateFn, done: int
) -> Iterator[Batch]:
    """Read this process's batches, each pair with a seed of its own.

    A pair's seed comes from its position in the whole run, whichever process it falls to.

    Args:
        config: Settings of the run.
        accelerator: Accelerator of this process.
        stream: Pairs behind those of the steps that were done.
        collate_fn: Function that makes a batch of pairs.
        done: Steps that were done.

    Yields:
        Batches with ``seeds``, on the accelerator's device, without end.
    """
    loader = DataLoader(
        stream,
        batch_size=config.batch_size,
        collate_fn=collate_fn,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        multiprocessing_context="spawn" if config.num_workers else None,  # torch's threads do not survive a fork
    )
    for number, batch in enumerate(loader, start=done * config.gradient_accumulation):
        first = (number * accelerator.num_processes + accelerator.process_index) * config.batch_size
        batch["seeds"] = pair_seeds(config.seed, range(first, first + len(batch["keys"])))
        yield to_device(batch, accelerator.device)


def pair_seeds(seed: int, positions: range) -> list[int]:
    """Give each position in a run a seed that has nothing in common with its neighbours'.

    Args:
        seed: Seed of the run.
        positions: Positions of pairs in the run.

    Returns:
        A seed for each of them, of 63 bits.
    """
    return [(position * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + 1) % 2**63 for position in positions]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors to a device; the rest of it stays."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
