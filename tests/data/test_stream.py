"""The stream that training reads: order, assignment, resuming, and what cannot be read."""

from __future__ import annotations

import itertools
import logging
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from blip_qformer.data import stream as stream_module
from blip_qformer.data.pairs import EncodedPair
from blip_qformer.data.shards import FileShard, TarShard
from blip_qformer.data.stream import PairStream, assign_shards, shuffled
from tests.data.examples import COUNT, SHARDS, first, indexed, keys


def batches(stream: PairStream, workers: int, count: int) -> list[list[str]]:
    """What a DataLoader makes of a stream."""
    loader = DataLoader(stream, batch_size=stream.batch_size, num_workers=workers, collate_fn=keys)
    return list(itertools.islice(iter(loader), count))


def test_the_order_is_a_function_of_seed_and_epoch(shards):
    order = keys(first(PairStream(shards, seed=1), 2 * COUNT))
    assert order == keys(first(PairStream(shards, seed=1), 2 * COUNT))
    assert order != keys(first(PairStream(shards, seed=2), 2 * COUNT))
    assert sorted(order[:COUNT]) == sorted(order[COUNT:])
    assert order[:COUNT] != order[COUNT:]


def test_the_buffer_mixes_and_loses_nothing():
    items = list(range(1000))
    mixed = list(shuffled(items, 100, random.Random(0)))
    assert sorted(mixed) == items
    assert np.corrcoef(mixed, items)[0, 1] < 0.99
    assert all(item <= index + 100 for index, item in enumerate(mixed))  # nothing is read further ahead
    assert list(shuffled(items, 0, random.Random(0))) == items


@pytest.mark.parametrize("kind", ["shards", "loose"])
def test_two_processes_with_two_workers_see_each_pair_once(request, kind):
    """Five shards for four readers: the fifth is shared by all. So is a small folder."""
    seen = []
    for process in range(2):
        stream = PairStream(request.getfixturevalue(kind), 3, process_index=process, process_count=2, batch_size=2)
        seen += itertools.chain(*batches(stream, 2, COUNT // 2 // 2))
    assert sorted(seen) == [f"{number:04d}" for number in range(COUNT)]


@pytest.mark.parametrize(("shards", "readers"), itertools.product([1, 3, 8, 13], [1, 2, 5, 16]))
def test_shards_are_assigned_evenly_without_overlap_or_loss(shards, readers):
    size = 32
    everything = [
        FileShard([EncodedPair(f"{shard} {number}", {}, "") for number in range(size)]) for shard in range(shards)
    ]
    read = [
        [encoded.key for each in assign_shards(everything, reader, readers) for encoded in each.read()]
        for reader in range(readers)
    ]
    assert Counter(itertools.chain(*read)) == Counter(f"{shard} {n}" for shard in range(shards) for n in range(size))
    even = shards * size / readers
    assert max(map(len, read)) <= math.ceil(even / size) * size
    assert min(map(len, read)) >= even / 2


@pytest.mark.parametrize("kind", ["shards", "loose", "indexed"])
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 3), (2, 2), (2, 1)])
def test_a_resumed_run_goes_on_in_the_same_order(request, tmp_path, kind, workers, batch_size):
    if kind == "indexed":
        source = indexed(request.getfixturevalue("shards"), tmp_path)
    else:
        source = request.getfixturevalue(kind)
    inputs = {"process_index": 1, "process_count": 2, "batch_size": batch_size, "shuffle_buffer": 5}
    whole = batches(PairStream(source, **inputs), workers, 3 * COUNT // batch_size)
    for skipped_batches in (1, 7, len(whole) - 3):  # the last in a later epoch
        resumed = PairStream(source, **inputs, skip=skipped_batches * batch_size)
        assert batches(resumed, workers, 3) == whole[skipped_batches : skipped_batches + 3]


def test_skipping_decodes_nothing_and_steps_over_whole_epochs(shards, tmp_path, monkeypatch):
    decoded, read = [], []
    monkeypatch.setattr(stream_module, "decode_pair", lambda encoded: decoded.append(encoded.key) or encoded)
    monkeypatch.setattr(TarShard, "read", lambda self, original=TarShard.read: read.append(self.url) or original(self))
    first(PairStream(indexed(shards, tmp_path), skip=100 * COUNT + 3), 1)
    assert len(decoded) == 1
    assert len(read) <= SHARDS


def damaged(loose: Path, folder: Path) -> tuple[Path, set[str]]:
    """The unpacked pairs with nine of them broken in nine ways, and the keys of the others."""
    shutil.copytree(loose, folder, dirs_exist_ok=True)
    image = (folder / "0000.target.webp").read_bytes()
    breaks = {
        "0000.target.webp": b"",
        "0001.subject.webp": image[: len(image) // 2],
        "0002.target.webp": b"GIF89a" + image[6:],
        "0003.subject.webp": b"not a picture",
        "0004.json": b"",
        "0005.json": b"[1, 2]",
        "0006.json": b'{"caption": "no word"}',
        "0007.subject.webp": None,
        "0008.json": None,
    }
    for name, content in breaks.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    return folder, {f"{number:04d}" for number in range(len(breaks), COUNT)}


def test_what_cannot_be_read_is_left_out_named_and_counted(loose, tmp_path, caplog):
    folder, whole = damaged(loose, tmp_path)
    stream = PairStream(folder)
    with caplog.at_level(logging.WARNING, "blip_diffusion"):
        found = keys(first(stream, 2 * COUNT))
    assert set(found[:COUNT]) == whole == set(found[COUNT:])
    assert len(set(found[:COUNT])) == COUNT - 9
    assert 9 <= stream.unreadable <= 18
    for key in ("0000", "0003", "0008"):
        assert (
            len([message for message in caplog.messages if message.startswith(f"Skipped {folder / key}, which")]) == 1
        )
    assert "Skipped 9 unreadable pairs or shards in epoch 0." in caplog.messages


def test_workers_count_what_they_cannot_read(loose, tmp_path):
    folder, _ = damaged(loose, tmp_path)
    stream = PairStream(folder)
    batches(stream, 2, 3 * COUNT)
    assert stream.unreadable >= 9


@pytest.mark.parametrize("skipped_batches", range(0, 60, 7))
def test_broken_pairs_do_not_move_a_resumed_run(loose, tmp_path, skipped_batches):
    folder, _ = damaged(loose, tmp_path)
    whole = keys(first(PairStream(folder), 80))
    assert keys(first(PairStream(folder, skip=skipped_batches), 80 - skipped_batches)) == whole[skipped_batches:]


def test_a_stream_that_finds_nothing_says_so(loose, tmp_path):
    for number in range(3):
        for ending in ("subject.webp", "target.webp", "json"):
            (tmp_path / f"{number}.{ending}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no readable pair for reader 1 of 1 \(processes x workers\): see"):
        next(iter(PairStream(tmp_path)))
    with pytest.raises(ValueError, match="reader 41 of 50"):
        next(iter(PairStream(loose, process_index=40, process_count=50)))
