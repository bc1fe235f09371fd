"""Shards of pairs, and the same pairs as files."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from blip_qformer.data.shards import write_shard
from tests.data.examples import COUNT, SHARDS, make_pair


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of five shards with eight pairs each."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, start in enumerate(range(0, COUNT, COUNT // SHARDS)):
        write_shard(folder / f"pairs-{shard:06d}.tar", map(make_pair, range(start, start + COUNT // SHARDS)))
    return folder


@pytest.fixture(scope="session")
def loose(shards, tmp_path_factory) -> Path:
    """The same shards, unpacked."""
    folder = tmp_path_factory.mktemp("loose")
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as archive:
            archive.extractall(folder, filter="data")
    return folder
