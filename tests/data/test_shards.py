"""Pairs on disk and the stream that training reads: order, sharing out, resuming, and what cannot be read."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import itertools
import json
import logging
import math
import random
import shutil
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from blip_qformer.data import stream as stream_module
from blip_qformer.data.pairs import EncodedPair, Pair, encode_pair
from blip_qformer.data.shards import FileShard, TarShard, write_shard
from blip_qformer.data.stream import PairStream, assign_shards, shuffled

COUNT, SHARDS = 40, 5


def make_pair(number: int) -> Pair:
    """A pair of two smooth pictures, each of a colour of its own."""
    ramp = np.linspace(0, 1, 24)[:, None, None]
    pictures = []
    for colour in np.random.default_rng(number).uniform(0, 255, (2, 3)):
        pictures.append(Image.fromarray(np.broadcast_to(ramp * colour, (24, 16, 3)).astype(np.uint8)))
    return Pair(f"{number:04d}", *pictures, f"word {number}", f"a café, {number}", {"style": "noto", "code": number})


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder of five shards with eight pairs each."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, start in enumerate(range(0, COUNT, COUNT // SHARDS)):
        write_shard(folder / f"pairs-{shard:06d}.tar", map(make_pair, range(start, start + COUNT // SHARDS)))
    return folder


@pytest.fixture(scope="module")
def loose(shards, tmp_path_factory) -> Path:
    """The same shards, unpacked."""
    folder = tmp_path_factory.mktemp("loose")
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as archive:
            archive.extractall(folder, filter="data")
    return folder


def indexed(shards: Path, folder: Path, **changes) -> Path:
    """A folder of the same shards with an index, as prepare writes it."""
    counts = {}
    for shard in sorted(shards.glob("*.tar")):
        (folder / shard.name).symlink_to(shard)
        counts[shard.name] = COUNT // SHARDS
    (folder / "index.json").write_text(json.dumps({"complete": True, "shards": counts} | changes))
    return folder


def keys(pairs) -> list[str]:
    return [pair.key for pair in pairs]


def first(stream, count: int) -> list[Pair]:
    return list(itertools.islice(iter(stream), count))


def batches(stream: PairStream, workers: int, count: int) -> list[list[str]]:
    """What a DataLoader makes of a stream."""
    loader = DataLoader(stream, batch_size=stream.batch_size, num_workers=workers, collate_fn=keys)
    return list(itertools.islice(iter(loader), count))


def test_a_pair_comes_back(shards):
    pairs = {pair.key: pair for pair in first(PairStream(shards), COUNT)}
    assert len(pairs) == COUNT
    for number in range(COUNT):
        found, expected = pairs[f"{number:04d}"], make_pair(number)
        assert (found.word, found.caption, found.extra) == (expected.word, expected.caption, expected.extra)
        for role in ("subject", "target"):
            difference = np.array(getattr(found, role), float) - np.array(getattr(expected, role), float)
            assert getattr(found, role).mode == "RGB"
            assert np.abs(difference).mean() < 4  # lossy


def test_the_same_pairs_give_the_same_bytes(shards, tmp_path):
    again = tmp_path / "again.tar"
    assert write_shard(again, map(make_pair, range(8))) == 8
    assert again.read_bytes() == (shards / "pairs-000000.tar").read_bytes()


def test_a_folder_gives_the_same_pairs_as_shards(shards, loose):
    from_shards = {pair.key: encode_pair(pair) for pair in first(PairStream(shards), COUNT)}
    from_folder = {pair.key: encode_pair(pair) for pair in first(PairStream(loose), COUNT)}
    assert from_folder == from_shards
    assert len(from_folder) == COUNT


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG"])
def test_pictures_of_other_formats_are_read(tmp_path, ending):
    pair = make_pair(0)
    for role in ("subject", "target"):
        getattr(pair, role).save(tmp_path / f"a.{role}.{ending}")
    (tmp_path / "a.json").write_text('{"word": "dog", "caption": "a dog"}')
    (found,) = first(PairStream(tmp_path), 1)
    assert np.abs(np.array(found.target, float) - np.array(pair.target, float)).mean() < 4


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
    assert all(item <= place + 100 for place, item in enumerate(mixed))  # nothing is read further ahead
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
    for taken in (1, 7, len(whole) - 3):  # the last in a later epoch
        resumed = PairStream(source, **inputs, skip=taken * batch_size)
        assert batches(resumed, workers, 3) == whole[taken : taken + 3]


def test_skipping_decodes_nothing_and_steps_over_whole_epochs(shards, tmp_path, monkeypatch):
    decoded, read = [], []
    monkeypatch.setattr(stream_module, "decode_pair", lambda encoded: decoded.append(encoded.key) or encoded)
    monkeypatch.setattr(TarShard, "read", lambda self, original=TarShard.read: read.append(self.url) or original(self))
    first(PairStream(indexed(shards, tmp_path), skip=100 * COUNT + 3), 1)
    assert len(decoded) == 1
    assert len(read) <= SHARDS


def test_any_caption_is_read_but_none_at_all(tmp_path, caplog):
    """It is not the word that the Q-Former is asked about: signs and length are for the text encoder to cut."""
    captions = {"a": "a dog 🐕 in the snow", "b": "🐕", "c": "dog " * 600, "d": "  "}
    for key, caption in captions.items():
        for role in ("subject", "target"):
            getattr(make_pair(0), role).save(tmp_path / f"{key}.{role}.png")
        (tmp_path / f"{key}.json").write_text(json.dumps({"word": "dog", "caption": caption}))
    found = first(PairStream(tmp_path), 3)
    assert {pair.key: pair.caption for pair in found} == {key: captions[key] for key in "abc"}
    assert all("its caption is empty" in message for message in caplog.messages)


def foreign_index(folder: Path) -> PairStream:
    (folder / "index.json").write_text('{"splits": ["train"]}')
    return PairStream(folder)


def damaged(loose: Path, folder: Path) -> tuple[Path, set[str]]:
    """The unpacked pairs with nine of them broken in nine ways, and the keys of the others."""
    shutil.copytree(loose, folder, dirs_exist_ok=True)
    picture = (folder / "0000.target.webp").read_bytes()
    breaks = {
        "0000.target.webp": b"",
        "0001.subject.webp": picture[: len(picture) // 2],
        "0002.target.webp": b"GIF89a" + picture[6:],
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


@pytest.mark.parametrize("taken", range(0, 60, 7))
def test_broken_pairs_do_not_move_a_resumed_run(loose, tmp_path, taken):
    folder, _ = damaged(loose, tmp_path)
    whole = keys(first(PairStream(folder), 80))
    assert keys(first(PairStream(folder, skip=taken), 80 - taken)) == whole[taken:]


def test_broken_shards_are_left_out(shards, tmp_path, caplog):
    paths = [tmp_path / shard.name for shard in sorted(shards.glob("*.tar"))]
    for path in paths:
        path.write_bytes((shards / path.name).read_bytes())
    paths[0].write_bytes(b"")
    paths[1].write_bytes(b"no archive at all" * 100)
    content = paths[2].read_bytes()
    with tarfile.open(paths[2]) as archive:
        end_of_fifth = archive.getmembers()[3 * 5].offset
    paths[2].write_bytes(content[: end_of_fifth + 700])
    stream = PairStream(str(tmp_path / "*.tar"))
    found = keys(first(stream, 21))
    assert sorted(found) == [f"{number:04d}" for number in (*range(16, 21), *range(24, 40))]
    assert [str(path.name) in caplog.text for path in paths] == [True, True, True, False, False]


def test_shards_come_from_a_bucket(shards, tmp_path, caplog):
    """Through webdataset's openers, by a pattern and by an index; what the bucket lacks is left out."""
    with bucket(indexed(shards, tmp_path)) as url:
        for source in (f"{url}/pairs-{{000000..000004}}.tar", f"{url}/index.json"):
            assert len(set(keys(first(PairStream(source), COUNT)))) == COUNT
        assert "Skipped" not in caplog.text
        found = keys(first(PairStream(f"{url}/pairs-{{000003..000005}}.tar"), 16))
    assert sorted(found) == [f"{number:04d}" for number in range(24, 40)]
    assert f"Skipped {url}/pairs-000005.tar" in caplog.text


@contextlib.contextmanager
def bucket(folder: Path):
    """A folder over HTTP."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_stream_that_finds_nothing_says_so(loose, tmp_path):
    for number in range(3):
        for ending in ("subject.webp", "target.webp", "json"):
            (tmp_path / f"{number}.{ending}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no readable pair for reader 1 of 1 \(processes x workers\): see"):
        next(iter(PairStream(tmp_path)))
    with pytest.raises(ValueError, match="reader 41 of 50"):
        next(iter(PairStream(loose, process_index=40, process_count=50)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: PairStream(folder), "holds neither shards"),
        (lambda folder: PairStream(folder / "gone"), "There is no folder and no shard"),
        (lambda folder: PairStream(folder / "index.json"), "make it with blip-qformer prepare"),
        (lambda folder: PairStream(folder / "*.tar"), "There is no folder and no shard"),
        (lambda folder: PairStream(folder, skip=5, batch_size=2), "5 pairs are to be skipped"),
        (lambda folder: PairStream(indexed(folder, folder, complete=False)), "is not complete: run the same"),
        (foreign_index, "does not list shards of blip-qformer prepare: name the shards themselves"),
        (lambda folder: write_shard(folder / "a.tar", [make_pair(1), make_pair(1)]), 'have the key "0001"'),
        (lambda folder: encode_pair(dataclasses.replace(make_pair(1), key="a.b")), 'The key "a.b"'),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path)


def test_a_shard_that_fails_leaves_nothing_behind(tmp_path):
    def pairs():
        yield make_pair(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", pairs())
    assert not list(tmp_path.iterdir())
