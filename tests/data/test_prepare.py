"""Making shards: by several processes, killed and gone on with, refused, and on a full disk."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from blip_qformer.data.prepare import PrepareResult, prepare
from blip_qformer.data.stream import PairStream
from tools.host import ROOT

#: A source in a module of its own, so that other processes can import it too.
SOURCE = '''
import os, time
import numpy as np
from PIL import Image
from blip_qformer.data.prepare import SkippedPairError
from blip_qformer.data.pairs import Pair

class Squares:
    """Random squares; every fifth and every seventh are skipped, ``fatal`` fails, and a negative one kills."""

    def __init__(self, count, pause=0.0, fatal=1000):
        self.count, self.pause, self.fatal = count, pause, fatal

    def __len__(self):
        return self.count

    def pair(self, index, seed):
        time.sleep(self.pause)
        if index == self.fatal:
            raise FileNotFoundError("artwork.png is gone")
        if index == -self.fatal:
            os.kill(os.getpid(), 9)
        if index % 5 == 0:
            raise SkippedPairError("too small", f"{index}\\n of 100")
        if index % 7 == 0:
            raise SkippedPairError("unreadable")
        pixels = np.random.default_rng((seed, index)).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
        return Pair(f"{index:06d}", *map(Image.fromarray, pixels), "square", f"made by {type(self).__name__}")
'''
RUN = """
import sys
from squares import Squares
from blip_qformer.data.prepare import prepare
if __name__ == "__main__":
    prepare(Squares(60, pause=0.05), sys.argv[1], seed=3, workers=2, pairs_per_shard=10)
"""
KEPT = [index for index in range(60) if index % 5 and index % 7]


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "squares.py").write_text(SOURCE)
    (folder / "run.py").write_text(RUN)
    return folder


@pytest.fixture
def squares(source_folder, monkeypatch) -> type:
    """The class of the source."""
    monkeypatch.syspath_prepend(source_folder)
    import squares

    return squares.Squares


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def expected(squares, tmp_path) -> dict[str, bytes]:
    """What one uninterrupted process makes."""
    prepare(squares(60), tmp_path / "expected", seed=3, pairs_per_shard=10)
    return contents(tmp_path / "expected")


def test_all_pairs_are_made_and_what_was_skipped_is_listed(squares, tmp_path):
    made = prepare(squares(60), tmp_path, seed=3, pairs_per_shard=25, settings={"source": ("squares", 1)})
    assert made == PrepareResult(len(KEPT), 3, {"too small": 12, "unreadable": 7})
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["complete"] is True
    assert index["pairs"] == len(KEPT) == sum(index["shards"].values())
    assert index["skipped"] == {"too small": 12, "unreadable": 7}
    assert index["settings"] == {"source": ["squares", 1], "seed": 3, "pairs_per_shard": 25, "source_size": 60}
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert lines[:4] == ["index\treason\tdetail", "0\ttoo small\t0 of 100", "5\ttoo small\t5 of 100", "7\tunreadable"]
    assert len(lines) == 1 + 19
    pairs = list(itertools.islice(iter(PairStream(tmp_path)), len(KEPT)))
    assert sorted(pair.key for pair in pairs) == [f"{index:06d}" for index in KEPT]


def test_a_shard_of_nothing_but_skipped_pairs_is_no_harm(squares, tmp_path):
    made = prepare(squares(8), tmp_path, pairs_per_shard=1)
    assert (made.pairs, made.shards) == (5, 8)
    assert len({pair.key for pair in itertools.islice(iter(PairStream(tmp_path)), 5)}) == 5


def test_killed_and_run_again_the_result_is_the_same(squares, source_folder, expected, tmp_path):
    """Two workers, whose parent is killed after the first shard; they do not outlive it, and one process goes on."""
    folder = tmp_path / "killed"
    command = [sys.executable, str(source_folder / "run.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(source_folder)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list(folder.glob("pairs-*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=60)[1]
    finished = contents(folder)
    assert json.loads(finished["index.json"])["complete"] is False
    assert 1 <= sum(name.endswith(".tar") for name in finished) < 6
    with pytest.raises(ValueError, match="is not complete: run the same blip-qformer prepare again"):
        PairStream(folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("pairs-*.json")}

    prepare(squares(60), folder, seed=3, pairs_per_shard=10)
    assert contents(folder) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_shard_without_a_report_is_made_again(squares, expected, tmp_path):
    """Killed between the two."""
    (tmp_path / "expected" / "pairs-000002.json").unlink()
    (tmp_path / "expected" / "pairs-000002.tar").write_bytes(b"half")
    prepare(squares(60), tmp_path / "expected", seed=3, pairs_per_shard=10)
    assert contents(tmp_path / "expected") == expected


def test_other_settings_are_refused(squares, tmp_path):
    prepare(squares(6), tmp_path, seed=3, settings={"style": "noto"})
    before = contents(tmp_path)
    message = r"was made with seed 3 instead of 4, source_size 6 instead of 9, style 'noto' instead of None: choose"
    with pytest.raises(ValueError, match=message):
        prepare(squares(9), tmp_path, seed=4)
    assert contents(tmp_path) == before


def test_shards_of_another_are_not_touched(squares, tmp_path):
    (tmp_path / "laion.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds shards and no index.json"):
        prepare(squares(6), tmp_path)
    with pytest.raises(ValueError, match="the source is empty"):
        prepare(squares(0), tmp_path)


def test_an_error_in_the_source_is_not_taken_for_a_full_disk(squares, tmp_path):
    with pytest.raises(ValueError, match="Pair 33 could not be made: artwork.png is gone"):
        prepare(squares(60, fatal=33), tmp_path, pairs_per_shard=10)
    assert not list(tmp_path.glob(".*"))


def test_a_killed_worker_gets_one_sentence(squares, tmp_path):
    with pytest.raises(OSError, match="A worker of prepare was killed, perhaps because memory ran out"):
        prepare(squares(60, fatal=-33), tmp_path, pairs_per_shard=10, workers=2)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_gets_one_sentence_and_leaves_no_half(squares, source_folder, tmp_path):
    """A limit on the size of files stands in for the disk; another one lets the work go on."""
    limited = """
import resource, sys
from squares import Squares
from blip_qformer.data.prepare import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
try:
    prepare(Squares(60), sys.argv[1], pairs_per_shard=int(sys.argv[2]))
except OSError as error:
    print(error)
"""
    folder = tmp_path / "full"
    result = subprocess.run(
        [sys.executable, "-c", limited, str(folder), "50"],
        env={**os.environ, "PYTHONPATH": str(source_folder)},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT.parent,
    )
    sentence = f"{folder}/pairs-000000.tar could not be written (File too large): make room on that disk or "
    assert result.stdout == sentence + (
        "choose another folder, and run it again. The shards that are complete are kept.\n"
    )
    assert [path.name for path in folder.iterdir()] == ["index.json"]
    assert prepare(squares(60), folder, pairs_per_shard=50).pairs == len(KEPT)
