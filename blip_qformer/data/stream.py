"""The endless stream of training pairs, whose order is a function of the seed and which resumes exactly.

Every epoch has its own order. The shards are shuffled and assigned to the workers of all processes, and each worker
shuffles what it reads in a buffer. What cannot be read is skipped and named in the log, and the next readable pair
replaces it, so that a position in the stream is the same whether or not the pairs before it were decoded.
"""

from __future__ import annotations

import itertools
import logging
import random
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .pairs import EncodedPair, Pair, decode_pair
from .shards import FileShard, Shard, TarShard, find_shards

FILE_SHARD_SIZE = 100  # pairs in a folder are assigned in groups of this size
MAX_LOGGED = 20  # unreadable pairs that each worker names in the log
MAX_WORKERS = 256  # workers of one process that have a counter of their own
MAX_EMPTY_EPOCHS = 10  # after so many epochs without a readable pair there will never be one

T = TypeVar("T")
log = logging.getLogger("blip_diffusion")


class PairStream(IterableDataset[Pair]):
    """Pairs without end, for a DataLoader with any number of workers.

    Args:
        sources: A folder that :func:`~.prepare.prepare` wrote or its ``index.json`` (also a URL); a folder of pairs or
            of shards; shards by path, URL or pattern, with ``{000..291}`` and, for files, ``*``; or several of these.
        seed: Seed of the order.
        process_index: Index of this training process.
        process_count: Number of training processes; each reads pairs of its own.
        skip: Number of pairs that this process has had already, a multiple of ``batch_size``. None of them is decoded,
            and whole epochs are skipped at once if an index says how long they are. A shard that has lost pairs since
            then, or a bucket that fails for a while, shifts what comes later.
        batch_size: The DataLoader's batch size; it takes one batch from each worker in turn.
        shuffle_buffer: Number of pairs that a worker mixes; with 0 only the shards are shuffled.
        allow: What the sources may do besides reading files, see :func:`~.shards.find_shards`.

    Raises:
        ValueError: There is no pair or shard, a source needs what is not allowed, or ``skip`` is no multiple of
            ``batch_size``.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        seed: int = 0,
        *,
        process_index: int = 0,
        process_count: int = 1,
        skip: int = 0,
        batch_size: int = 1,
        shuffle_buffer: int = 1000,
        allow: Collection[str] = (),
    ) -> None:
        super().__init__()
        if skip % batch_size:
            raise ValueError(f"{skip} pairs are to be skipped, which is no multiple of the batch size {batch_size}.")
        self.sources = [sources] if isinstance(sources, str | Path) else list(sources)
        self.seed = seed
        self.process_index, self.process_count = process_index, process_count
        self.skip, self.batch_size = skip, batch_size
        self.shuffle_buffer = shuffle_buffer
        shards = [shard for source in self.sources for shard in find_shards(source, allow)]
        self._archives = [shard for shard in shards if isinstance(shard, TarShard)]
        self._files = [pair for shard in shards if isinstance(shard, FileShard) for pair in shard.pairs]
        self._unreadable = torch.zeros(MAX_WORKERS, dtype=torch.int64).share_memory_()  # a counter for each worker

    @property
    def unreadable(self) -> int:
        """How often something could not be read so far, in all workers of this process."""
        return int(self._unreadable.sum())

    def __iter__(self) -> Iterator[Pair]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        resumed_worker, skip = self._resume(worker_id, num_workers)
        reader, readers = self.process_index * num_workers + resumed_worker, self.process_count * num_workers
        report = _UnreadableReport(self._unreadable[worker_id % MAX_WORKERS])

        to_replace = empty_epochs = 0
        for epoch in itertools.count():
            slices = assign_shards(self._shuffled_shards(epoch), reader, readers)
            length = _total_count(slices)
            if length and skip >= length:
                skip -= length
                continue
            empty_epochs += 1
            rng = random.Random(f"{self.seed} {epoch} {reader} of {readers}")
            for encoded in shuffled(_read_slices(slices, rng, report), self.shuffle_buffer, rng):
                if skip:
                    skip -= 1
                    empty_epochs = 0
                    continue
                try:
                    pair = decode_pair(encoded)
                except Exception as error:  # there is no list of what a damaged image can raise
                    report.add(encoded.origin, error)
                    to_replace += 1
                    continue
                empty_epochs = 0
                yield from itertools.repeat(pair, to_replace + 1)
                to_replace = 0
            report.end_epoch(epoch)
            if empty_epochs == MAX_EMPTY_EPOCHS:
                raise ValueError(
                    f"In {', '.join(map(str, self.sources))} there is no readable pair for reader {reader + 1} of "
                    f"{readers} (processes x workers): see the warnings above, or use fewer workers."
                )

    def _resume(self, worker_id: int, num_workers: int) -> tuple[int, int]:
        """Find whose pairs a worker reads, and how many of them it skips.

        A DataLoader begins with its first worker. So after a resume the first worker reads the pairs of the worker
        whose turn it was, and the others follow.

        Returns:
            The number of the worker that is resumed, and the number of its pairs that are skipped.
        """
        batches = self.skip // self.batch_size
        resumed_worker = (worker_id + batches) % num_workers
        own_batches = batches // num_workers + (resumed_worker < batches % num_workers)
        return resumed_worker, own_batches * self.batch_size

    def _shuffled_shards(self, epoch: int) -> list[Shard]:
        """List all shards in the order of an epoch, the same for every process and worker."""
        rng = random.Random(f"{self.seed} {epoch}")
        files = list(self._files)
        rng.shuffle(files)
        groups = (FileShard(files[start : start + FILE_SHARD_SIZE]) for start in range(0, len(files), FILE_SHARD_SIZE))
        shards: list[Shard] = [*self._archives, *groups]
        rng.shuffle(shards)
        return shards


@dataclass(frozen=True)
class ShardSlice:
    """The pairs ``start``, ``start + step``, and so on of a shard.

    Args:
        shard: The shard.
        start: Index of the first pair.
        step: Distance from one pair to the next.
    """

    shard: Shard
    start: int
    step: int

    @property
    def count(self) -> int | None:
        """The number of pairs, if known."""
        return None if self.shard.count is None else len(range(self.start, self.shard.count, self.step))

    def read(self) -> Iterator[EncodedPair]:
        """Yield the slice's pairs."""
        return itertools.islice(self.shard.read(), self.start, None, self.step)


def assign_shards(shards: Sequence[Shard], reader: int, readers: int) -> list[ShardSlice]:
    """Select what one of several readers reads: whole shards as far as they suffice, and slices of the rest.

    Args:
        shards: All shards, in the same order for every reader.
        reader: Index of the reader.
        readers: Number of readers.

    Returns:
        The reader's slices. Together, the slices of all readers hold every pair once.
    """
    whole = len(shards) // readers * readers
    slices = [ShardSlice(shard, 0, 1) for shard in shards[reader:whole:readers]]
    if rest := shards[whole:]:
        shared = reader % len(rest)
        sharers = range(shared, readers, len(rest))  # the readers of this shard
        slices.append(ShardSlice(rest[shared], sharers.index(reader), len(sharers)))
    return slices


def shuffled(items: Iterable[T], buffer_size: int, rng: random.Random) -> Iterator[T]:
    """Yield items in an order that is mixed by a buffer.

    Args:
        items: The items.
        buffer_size: Number of items that are mixed at a time; with 0 and 1 the order stays.
        rng: The source of the order.

    Yields:
        Each item once.
    """
    buffer: list[T] = []
    for item in items:
        if len(buffer) < max(1, buffer_size):
            buffer.append(item)
            continue
        index = rng.randrange(len(buffer))
        yield buffer[index]
        buffer[index] = item
    rng.shuffle(buffer)
    yield from buffer


class _UnreadableReport:
    """Counts what one worker could not read, and names the first of it in the log.

    Args:
        count: A counter in memory that the main process sees; of shape [].
    """

    def __init__(self, count: Tensor) -> None:
        self._count = count
        self._logged: set[str] = set()
        self._in_epoch = 0

    def add(self, origin: str, error: Exception) -> None:
        """Count a pair or a shard, and log it unless it was logged before."""
        self._count += 1
        self._in_epoch += 1
        if origin not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(origin)
            log.warning("Skipped %s, which cannot be read (%s: %s).", origin, type(error).__name__, error)

    def end_epoch(self, epoch: int) -> None:
        """Log how much was skipped in an epoch."""
        if self._in_epoch:
            log.warning("Skipped %d unreadable pairs or shards in epoch %d.", self._in_epoch, epoch)
        self._in_epoch = 0


def _read_slices(slices: Sequence[ShardSlice], rng: random.Random, report: _UnreadableReport) -> Iterator[EncodedPair]:
    """Yield the pairs of slices, one slice after the other; of a damaged archive, the pairs before the damage."""
    slices = list(slices)
    rng.shuffle(slices)
    for each in slices:
        try:
            yield from each.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            report.add(getattr(each.shard, "url", ""), error)


def _total_count(slices: Sequence[ShardSlice]) -> int | None:
    counts = [each.count for each in slices]
    return sum(count for count in counts if count is not None) if None not in counts else None
