"""Shards on disk and in a bucket, and what is wrong with some of them."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import tarfile
import threading
from pathlib import Path

import pytest

from blip_qformer.data.pairs import encode_pair
from blip_qformer.data.shards import expand_braces, find_shards, is_remote, write_shard
from blip_qformer.data.stream import PairStream
from tests.data.examples import COUNT, first, indexed, keys, make_pair


def test_the_same_pairs_give_the_same_bytes(shards, tmp_path):
    again = tmp_path / "again.tar"
    assert write_shard(again, map(make_pair, range(8))) == 8
    assert again.read_bytes() == (shards / "pairs-000000.tar").read_bytes()


def test_a_folder_gives_the_same_pairs_as_shards(shards, loose):
    from_shards = {pair.key: encode_pair(pair) for pair in first(PairStream(shards), COUNT)}
    from_folder = {pair.key: encode_pair(pair) for pair in first(PairStream(loose), COUNT)}
    assert from_folder == from_shards
    assert len(from_folder) == COUNT


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
            assert len(set(keys(first(PairStream(source, allow=["urls"]), COUNT)))) == COUNT
        assert "Skipped" not in caplog.text
        found = keys(first(PairStream(f"{url}/pairs-{{000003..000005}}.tar", allow=["urls"]), 16))
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


def foreign_index(folder: Path) -> PairStream:
    (folder / "index.json").write_text('{"splits": ["train"]}')
    return PairStream(folder)


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


def test_brackets_and_braces_in_a_folders_name_are_only_a_name(shards, tmp_path):
    folder = tmp_path / "my [best] {pairs}" / "set [1-2]"
    folder.mkdir(parents=True)
    for shard in shards.glob("*.tar"):
        (folder / shard.name).symlink_to(shard)
    one = folder / "pairs-000003.tar"
    for source, count in ((folder, 5), (folder / "*.tar", 5), (folder / "pairs-{000001..000003}.tar", 3), (one, 1)):
        assert len(find_shards(source)) == count
        assert len(find_shards(str(source))) == count
    assert find_shards(folder / "pairs-{000003..000003}.tar") == find_shards(one) == find_shards(one.as_uri())
    assert len(set(keys(first(PairStream(folder / "pairs-{000000..000004}.tar"), COUNT)))) == COUNT


def test_backslashes_stay_where_they_are():
    expected = [rf"C:\data\new\pairs-{number:03d}.tar" for number in range(3)]
    assert expand_braces(r"C:\data\new\pairs-{000..002}.tar") == expected
    assert expand_braces(r"\\server\share\{a,b}.tar") == [r"\\server\share\a.tar", r"\\server\share\b.tar"]


@pytest.mark.parametrize(
    "path", [r"C:\data\x.tar", "C:/data/x.tar", "C://x.tar", r"\\server\x", "pairs/x.tar", "pipe/x"]
)
def test_a_path_is_no_url(path):
    assert not is_remote(path)


@pytest.mark.parametrize(
    "braces", ["{0..1000000}", "{-9..999999999}", "{0..99}" * 4, "{a,b}" * 30, "{1..%s}" % ("9" * 400)]
)
def test_a_range_without_end_is_refused(braces):
    with pytest.raises(ValueError, match="stands for more than 1,000,000 shards: write a smaller range"):
        expand_braces(f"pairs-{braces}.tar")
    assert len(expand_braces("{0..9}{a,b,c}")) == 30
