"""Training examples on disk, and the endless stream that training reads them from.

A *pair* is one example: a thing on another background, the photograph it was cut from, the word for the thing, and a
caption of the photograph. Its files are ``{key}.subject.webp``, ``{key}.target.webp`` and ``{key}.json``; they lie in a
folder, or one after the other in *shards*, tar archives as webdataset has them, which stream from a bucket as well.
"""

from __future__ import annotations

import itertools
import logging
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .pairs import Pair, Sample, decode_pair
from .shards import LoosePairs, Part, Shard, find_parts

LOOSE_PAIRS = 100  # files in a folder are handed out in runs of so many


LISTED = 20  # unreadable pairs that are named in the log, by each worker


MOST_WORKERS = 256  # of one process, that count what they could not read


MOST_EMPTY_EPOCHS = 10  # a stream that finds nothing for so long will never find anything


log = logging.getLogger("blip_diffusion")


class PairStream(IterableDataset):
    """Pairs without end, in an order that is a function of the seed, for a DataLoader with any number of workers.

    Every epoch has its own order: the shards are shuffled, shared out among all workers of all processes, and each
    worker shuffles what it reads in a buffer. What cannot be read is left out and named in the log, and the next
    readable pair stands in for it, so that a place in the stream is the same whether or not what is before was decoded.

    Args:
        sources: a folder that :func:`~.prepare.prepare` wrote or its ``index.json`` (also a URL); a folder of pairs, or
            of shards; shards by path, URL or pattern, with ``{000..291}`` and, for files, ``*``; or several of these.
        seed: of the order.
        process_index, process_count: which of how many training processes this is; each sees a part of its own.
        skip: how many pairs this process has had already, a multiple of batch_size. Nothing of them is decoded, and
            whole epochs are stepped over where an index says how long they are. A shard that has lost pairs since then,
            or a bucket that fails for a while, shifts what comes later.
        batch_size: the DataLoader's, which takes one batch from each worker in turn.
        shuffle_buffer: how many pairs a worker mixes; 0: none, the shards alone are shuffled.

    Raises:
        ValueError: there is no pair or shard there, or skip is no multiple of batch_size.
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
    ) -> None:
        super().__init__()
        if skip % batch_size:
            raise ValueError(f"{skip} pairs are to be skipped, which is no multiple of the batch size {batch_size}.")
        self.sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
        self.seed = seed
        self.process_index, self.process_count = process_index, process_count
        self.skip, self.batch_size = skip, batch_size
        self.shuffle_buffer = shuffle_buffer
        found = [part for source in self.sources for part in find_parts(source)]
        self._shards = [part for part in found if isinstance(part, Shard)]
        self._loose = [sample for part in found if isinstance(part, LoosePairs) for sample in part.samples]
        self._unreadable = torch.zeros(MOST_WORKERS, dtype=torch.int64).share_memory_()  # seen by all workers

    @property
    def unreadable(self) -> int:
        """How often something could not be read so far, in all workers of this process."""
        return int(self._unreadable.sum())

    def __iter__(self) -> Iterator[Pair]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        taken = self.skip // self.batch_size  # batches, from the workers in turn; the next one is the first one's now
        role = (number + taken) % workers
        skip = (taken // workers + (role < taken % workers)) * self.batch_size
        stream, streams = self.process_index * workers + role, self.process_count * workers
        report = _Report(self._unreadable[number % MOST_WORKERS])

        standing_in = empty_epochs = 0
        for epoch in itertools.count():
            shares = share_out(self._parts(epoch), stream, streams)
            length = _total(shares)
            if length and skip >= length:
                skip -= length
                continue
            empty_epochs += 1
            order = random.Random(f"{self.seed} {epoch} {stream} of {streams}")
            for sample in shuffled(_read_all(shares, order, report), self.shuffle_buffer, order):
                if skip:
                    skip -= 1
                    empty_epochs = 0
                    continue
                try:
                    pair = decode_pair(sample)
                except Exception as error:  # there is no list of what a damaged picture can raise
                    report.add(sample.place, error)
                    standing_in += 1
                    continue
                empty_epochs = 0
                yield from itertools.repeat(pair, standing_in + 1)
                standing_in = 0
            report.summarise(epoch)
            if empty_epochs == MOST_EMPTY_EPOCHS:
                raise ValueError(
                    f"In {', '.join(map(str, self.sources))} there is no readable pair for reader {stream + 1} of "
                    f"{streams} (processes x workers): see the warnings above, or use fewer workers."
                )

    def _parts(self, epoch: int) -> list[Part]:
        """Everything there is, in this epoch's order; the same for every process and worker."""
        order = random.Random(f"{self.seed} {epoch}")
        loose = list(self._loose)
        order.shuffle(loose)
        runs = (LoosePairs(loose[start : start + LOOSE_PAIRS]) for start in range(0, len(loose), LOOSE_PAIRS))
        parts = [*self._shards, *runs]
        order.shuffle(parts)
        return parts


def share_out(parts: Sequence[Part], stream: int, streams: int) -> list[Share]:
    """What one of several readers reads: whole parts as far as they go round, and of the rest every so many pairs."""
    round_end = len(parts) // streams * streams
    shares = [Share(part, 0, 1) for part in parts[stream:round_end:streams]]
    rest = parts[round_end:]
    if rest:
        mine = stream % len(rest)
        readers = range(mine, streams, len(rest))
        shares.append(Share(rest[mine], readers.index(stream), len(readers)))
    return shares


@dataclass(frozen=True)
class Share:
    """Of a part, the pairs ``first``, ``first + step``, and so on."""

    part: Part
    first: int
    step: int

    @property
    def count(self) -> int | None:
        """How many those are, where it is known."""
        return None if self.part.count is None else len(range(self.first, self.part.count, self.step))

    def read(self) -> Iterator[Sample]:
        """Those pairs."""
        return itertools.islice(self.part.read(), self.first, None, self.step)


def shuffled(samples: Iterable[Sample], size: int, order: random.Random) -> Iterator[Sample]:
    """Samples as they come, mixed in a buffer of ``size``."""
    buffer: list[Sample] = []
    for sample in samples:
        if len(buffer) < max(1, size):
            buffer.append(sample)
            continue
        place = order.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = sample
    order.shuffle(buffer)
    yield from buffer


class _Report:
    """What one worker could not read: named in the log as far as it is not too much, and counted."""

    def __init__(self, count: Tensor) -> None:
        """count: a number that the main process can see."""
        self._count = count
        self._named: set[str] = set()
        self._in_epoch = 0

    def add(self, place: str, error: Exception) -> None:
        """Count a pair or shard, and name it if it was not named before."""
        self._count += 1
        self._in_epoch += 1
        if place not in self._named and len(self._named) < LISTED:
            self._named.add(place)
            log.warning("Skipped %s, which cannot be read (%s: %s).", place, type(error).__name__, error)

    def summarise(self, epoch: int) -> None:
        """At the end of an epoch, say how much was left out."""
        if self._in_epoch:
            log.warning("Skipped %d unreadable pairs or shards in epoch %d.", self._in_epoch, epoch)
        self._in_epoch = 0


def _read_all(shares: Sequence[Share], order: random.Random, report: _Report) -> Iterator[Sample]:
    """Every pair of the shares, one share after the other; of a shard that breaks off, what comes before."""
    shares = list(shares)
    order.shuffle(shares)
    for share in shares:
        try:
            yield from share.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            report.add(getattr(share.part, "url", ""), error)


def _total(shares: Sequence[Share]) -> int | None:
    counts = [share.count for share in shares]
    return None if None in counts else sum(counts)
