"""Make the pairs of a source once, in several processes, and write them as shards.

Shards appear whole or not at all, so that the work can be killed at any point and resumed from the last complete one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Protocol

import torch

from ..atomic import atomic_file, only_writer, remove_partial
from ..extras import import_extra
from ..limits import MAX_INDEX_BYTES
from ..plain_data import parse_json, read_bytes
from .pairs import Pair
from .shards import INDEX_NAME, write_shard

SKIPPED_NAME = "skipped.txt"
TASKS_PER_WORKER = 2  # in the queue, so that no worker waits


class SkippedPairError(Exception):
    """A pair is not made, because a filter refuses it or its image cannot be read.

    Args:
        reason: A few words, the same for all pairs of one kind; they are counted by it.
        detail: What is particular to this pair.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class PairSource(Protocol):
    """Makes pairs by index. It is copied to other processes, so it must be picklable."""

    def __len__(self) -> int: ...

    def pair(self, index: int, seed: int) -> Pair:
        """Make one pair, which depends on the source, the index and the seed alone.

        Args:
            index: Index of the pair, below the source's length.
            seed: Seed of everything random in the pairs.

        Returns:
            The pair.

        Raises:
            SkippedPairError: There is no pair for this index.
        """
        ...


@dataclass(frozen=True)
class PrepareResult:
    """What :func:`prepare` made.

    Args:
        pairs: Number of pairs.
        shards: Number of shards.
        skipped: Number of skipped pairs by reason, the most frequent first.
    """

    pairs: int
    shards: int
    skipped: Mapping[str, int]


def prepare(
    source: PairSource,
    destination: str | Path,
    seed: int = 0,
    workers: int = 1,
    pairs_per_shard: int = 1000,
    settings: Mapping[str, object] | None = None,
) -> PrepareResult:
    """Make all pairs of a source and write them as shards, with ``index.json`` and ``skipped.txt`` beside them.

    Shards that are complete already are kept. The result depends neither on the number of workers nor on how often the
    work was interrupted.

    Args:
        source: The source of the pairs.
        destination: The folder to write; it is made if missing.
        seed: Seed of everything random in the pairs.
        workers: Number of processes; with 1 the work is done in this process.
        pairs_per_shard: Number of indices that a shard covers; skipped ones leave it smaller.
        settings: The settings of the source, as JSON can hold them; they are kept in the index.

    Returns:
        The numbers of pairs, shards and skipped pairs.

    Raises:
        ValueError: The source is empty, the folder was made with other settings, or another prepare is writing there.
        OSError: The disk is full, or the folder cannot be written to.
    """
    if not len(source):
        raise ValueError("There is nothing to make pairs from: the source is empty.")
    folder = Path(destination)
    with only_writer(folder, "prepare"):
        return _prepare(source, folder, seed, workers, pairs_per_shard, settings)


def _prepare(
    source: PairSource,
    folder: Path,
    seed: int,
    workers: int,
    pairs_per_shard: int,
    settings: Mapping[str, object] | None,
) -> PrepareResult:
    """Make all pairs in a folder that no other process writes into, see :func:`prepare`."""
    settings = {**(settings or {}), "seed": seed, "pairs_per_shard": pairs_per_shard, "source_size": len(source)}
    _open_folder(folder, json.loads(json.dumps(settings)))  # as it will be read from the index

    starts = range(0, len(source), pairs_per_shard)
    tasks = [
        _ShardTask(folder / f"pairs-{number:06d}.tar", range(start, min(start + pairs_per_shard, len(source))), seed)
        for number, start in enumerate(starts)
    ]
    missing = [task for task in tasks if not (task.path.is_file() and task.report_path.is_file())]
    try:
        with import_extra("tqdm", "Preparing pairs").tqdm(total=len(source), desc="prepare", unit="pair") as bar:
            bar.update(len(source) - sum(len(task.indices) for task in missing))
            for task in _run_tasks(missing, source, workers):
                bar.update(len(task.indices))
    finally:
        remove_partial(folder, exclusive=True)
    return _write_index(folder, settings, tasks)


@dataclass(frozen=True)
class _ShardTask:
    """One shard to make; its report is written after it and marks it as complete.

    Args:
        path: The shard's path.
        indices: Indices of its pairs.
        seed: Seed of everything random in them.
    """

    path: Path
    indices: range
    seed: int

    @property
    def report_path(self) -> Path:
        """Path of the report."""
        return self.path.with_suffix(".json")


def _open_folder(folder: Path, settings: Mapping[str, object]) -> None:
    """Make the folder with an index, or check that it was made with the same settings.

    Raises:
        ValueError: The folder was made with other settings, or holds shards without an index.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        before = _settings(index)
        if differences := sorted(
            f"{name} {before.get(name)!r} instead of {settings.get(name)!r}"
            for name in {*before, *settings}
            if before.get(name) != settings.get(name)
        ):
            raise ValueError(f"{folder} was made with {', '.join(differences)}: choose another folder, or empty it.")
    elif any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds shards and no {INDEX_NAME}: choose another folder, or empty it.")
    else:
        _write_json(index, {"complete": False, "settings": settings})
    remove_partial(folder, exclusive=True)


def _settings(index: Path) -> dict[str, Any]:
    """Return the settings in an index; ValueError if it is none of ours."""
    content = parse_json(read_bytes(index, MAX_INDEX_BYTES), str(index))
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise ValueError(f"{index} was not written by blip-qformer prepare: choose another folder, or empty it.")
    return content["settings"]


def _write_index(folder: Path, settings: Mapping[str, object], tasks: Sequence[_ShardTask]) -> PrepareResult:
    """Write the complete index and the list of skipped pairs from the shards' reports."""
    reports = {task.path.name: json.loads(task.report_path.read_bytes()) for task in tasks}
    skipped = [each for report in reports.values() for each in report["skipped"]]
    reasons = dict(Counter(reason for _, reason, _ in skipped).most_common())
    shards = {name: report["pairs"] for name, report in reports.items()}
    with atomic_file(folder / SKIPPED_NAME) as temporary:
        lines = ["\t".join(map(str, each)).rstrip() + "\n" for each in skipped]
        temporary.write_text("index\treason\tdetail\n" + "".join(lines), encoding="utf-8")
    pairs = sum(shards.values())
    index = {"complete": True, "pairs": pairs, "skipped": reasons, "settings": settings, "shards": shards}
    _write_json(folder / INDEX_NAME, index)
    return PrepareResult(pairs, len(shards), reasons)


def _run_tasks(tasks: Sequence[_ShardTask], source: PairSource, workers: int) -> Iterator[_ShardTask]:
    """Make all shards, and yield each task when it is done."""
    return _run_in_pool(tasks, source, workers) if workers > 1 else _run_here(tasks, source)


def _run_here(tasks: Sequence[_ShardTask], source: PairSource) -> Iterator[_ShardTask]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: more threads round differently
    try:
        for task in tasks:
            _make_shard(task, source)
            yield task
    finally:
        torch.set_num_threads(threads)


def _run_in_pool(tasks: Sequence[_ShardTask], source: PairSource, workers: int) -> Iterator[_ShardTask]:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(workers, len(tasks) or 1), context, _start_worker, (source,)) as pool:
        waiting = iter(tasks)
        running: dict[Future[None], _ShardTask] = {}
        try:
            while True:
                for task in waiting:
                    running[pool.submit(_make_shard_in_worker, task)] = task
                    if len(running) >= workers * TASKS_PER_WORKER:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield running.pop(future)
        except BrokenProcessPool as error:
            raise OSError(
                "A worker of prepare was killed, perhaps because memory ran out: use fewer workers, and run it again; "
                "it goes on where it was."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_source: PairSource  # of this worker process: sent once, not with every task


def _start_worker(source: PairSource) -> None:
    """Prepare a worker process: one thread, and an end at Ctrl-C or when the parent ends."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["NUMBA_NUM_THREADS"] = "1"  # read when pymatting imports numba
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    wait_for_any([parent.sentinel])
    os._exit(1)


def _make_shard_in_worker(task: _ShardTask) -> None:
    _make_shard(task, _source)


def _make_shard(task: _ShardTask, source: PairSource) -> None:
    """Write one shard, and then its report: the number of its pairs, and those that were skipped."""
    skipped: list[tuple[int, str, str]] = []

    def pairs() -> Iterator[Pair]:
        for index in task.indices:
            try:
                yield source.pair(index, task.seed)
            except SkippedPairError as skip:
                skipped.append((index, skip.reason, " ".join(skip.detail.split())))
            except OSError as error:  # must not be taken for a failure to write the shard
                raise ValueError(f"Pair {index} could not be made: {error}") from error

    try:
        count = write_shard(task.path, pairs())
        _write_json(task.report_path, {"pairs": count, "skipped": skipped})
    except OSError as error:
        raise OSError(f"{error} The shards that are complete are kept.") from error


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
