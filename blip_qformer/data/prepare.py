"""Pairs are made once, by several processes, and kept as shards; killed anywhere, it goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Protocol

import torch

from ..atomic import atomic_file, remove_partial
from ..extras import import_extra
from .pairs import Pair
from .shards import INDEX, write_shard

SKIPPED = "skipped.txt"


TASKS_AHEAD = 2  # for each worker, so that none waits


class SkippedPair(Exception):
    """A pair that is not made, because a filter refuses it or its picture cannot be read.

    Args:
        reason: in a few words, the same for all of its kind: they are counted by it.
        detail: what is particular to this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class PairSource(Protocol):
    """What pairs are made from; it is copied to other processes, hence picklable."""

    def __len__(self) -> int: ...

    def pair(self, index: int, seed: int) -> Pair:
        """Make one pair, a function of nothing but the source, the index and the seed.

        Raises:
            SkippedPair: there is none for this index.
        """
        ...


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` made: how many pairs, in how many shards, and how many were skipped for which reason."""

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
) -> Prepared:
    """Make all pairs of a source and write them as shards, with ``index.json`` and ``skipped.txt`` beside them.

    Shards that are complete already are kept. The result does not depend on the number of workers, nor on how often
    the work was interrupted.

    Args:
        destination: a folder, made if missing.
        seed: of everything random in the pairs.
        workers: processes; 1: this one.
        pairs_per_shard: how many indices a shard covers; those that are skipped leave it smaller.
        settings: what the source was made with, as JSON can hold it; kept in the index.

    Raises:
        ValueError: the source is empty, or the folder was made with other settings.
        OSError: the disk is full, or the folder cannot be written to.
    """
    if not len(source):
        raise ValueError("There is nothing to make pairs from: the source is empty.")
    folder = Path(destination)
    made_with = {**(settings or {}), "seed": seed, "pairs_per_shard": pairs_per_shard, "source_size": len(source)}
    _begin(folder, json.loads(json.dumps(made_with)))

    starts = range(0, len(source), pairs_per_shard)
    tasks = [
        _Task(folder / f"pairs-{number:06d}.tar", range(start, min(start + pairs_per_shard, len(source))), seed)
        for number, start in enumerate(starts)
    ]
    missing = [task for task in tasks if not (task.path.is_file() and task.report_path.is_file())]
    try:
        with import_extra("tqdm", "Preparing pairs").tqdm(total=len(source), desc="prepare", unit="pair") as bar:
            bar.update(len(source) - sum(len(task.indices) for task in missing))
            for task in _made(missing, source, workers):
                bar.update(len(task.indices))
    finally:
        remove_partial(folder)
    return _finish(folder, made_with, tasks)


@dataclass(frozen=True)
class _Task:
    """One shard to be made from some indices; its report, written after it, says that it is complete."""

    path: Path
    indices: range
    seed: int

    @property
    def report_path(self) -> Path:
        return self.path.with_suffix(".json")


def _begin(folder: Path, made_with: Mapping[str, object]) -> None:
    """Make the folder, or see that what lies in it was made with the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / INDEX
    if index.is_file():
        before = json.loads(index.read_bytes())["settings"]
        if differences := sorted(
            f"{name} {before.get(name)!r} instead of {made_with.get(name)!r}"
            for name in {*before, *made_with}
            if before.get(name) != made_with.get(name)
        ):
            raise ValueError(f"{folder} was made with {', '.join(differences)}: choose another folder, or empty it.")
    elif any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds shards and no {INDEX}: choose another folder, or empty it.")
    else:
        _write_json(index, {"complete": False, "settings": made_with})
    remove_partial(folder)


def _finish(folder: Path, made_with: Mapping[str, object], tasks: list[_Task]) -> Prepared:
    """Write the index and the list of what was skipped, and sum them up."""
    reports = {task.path.name: json.loads(task.report_path.read_bytes()) for task in tasks}
    skipped = [each for report in reports.values() for each in report["skipped"]]
    reasons = dict(Counter(reason for _, reason, _ in skipped).most_common())
    shards = {name: report["pairs"] for name, report in reports.items()}
    with atomic_file(folder / SKIPPED) as temporary:
        lines = ["\t".join(map(str, each)).rstrip() + "\n" for each in skipped]
        temporary.write_text("index\treason\tdetail\n" + "".join(lines), encoding="utf-8")
    pairs = sum(shards.values())
    content = {"complete": True, "pairs": pairs, "skipped": reasons, "settings": made_with, "shards": shards}
    _write_json(folder / INDEX, content)
    return Prepared(pairs, len(shards), reasons)


def _made(tasks: list[_Task], source: PairSource, workers: int) -> Iterator[_Task]:
    """Do all tasks, and yield each when it is done."""
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: more threads round differently
        try:
            for task in tasks:
                _make_shard(task, source)
                yield task
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(workers, len(tasks) or 1), context, _start_worker, (source,)) as pool:
        waiting = iter(tasks)
        running: dict[Future, _Task] = {}
        try:
            while True:
                for task in waiting:
                    running[pool.submit(_make_shard_in_worker, task)] = task
                    if len(running) >= workers * TASKS_AHEAD:
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


_source: PairSource  # of this worker process; sent once instead of with every task


def _start_worker(source: PairSource) -> None:
    """In a new process: one thread, and an end at Ctrl-C or when the parent ends."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["NUMBA_NUM_THREADS"] = "1"  # read when pymatting imports numba
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for_any([parent.sentinel]), os._exit(1)), daemon=True).start()


def _make_shard_in_worker(task: _Task) -> None:
    _make_shard(task, _source)


def _make_shard(task: _Task, source: PairSource) -> None:
    """Write one shard, and after it its report: how many pairs it has, and what was skipped why."""
    skipped: list[tuple[int, str, str]] = []

    def pairs() -> Iterator[Pair]:
        for index in task.indices:
            try:
                yield source.pair(index, task.seed)
            except SkippedPair as skip:
                skipped.append((index, skip.reason, " ".join(skip.detail.split())))
            except OSError as error:  # not to be taken for one of writing
                raise ValueError(f"Pair {index} could not be made: {error}") from error

    try:
        count = write_shard(task.path, pairs())
        _write_json(task.report_path, {"pairs": count, "skipped": skipped})
    except OSError as error:
        raise OSError(
            f"{task.path} could not be written ({error.strerror or error}): make room on that disk and run it again; "
            "the shards that are complete are kept."
        ) from error


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
