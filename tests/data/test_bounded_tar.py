"""Archives and indexes that claim more than they hold, or that are none."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest

from blip_qformer.data.bounded_tar import read_members
from blip_qformer.data.shards import find_shards


def claiming(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims a size, with a right checksum."""
    info = tarfile.TarInfo("0000.json")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse() -> bytes:
    """A file of 8 GB in 2.5 kB: GNU tar's sparse format, of which only holes are left."""
    info = tarfile.TarInfo("0000.json")
    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(8 * 2**30)}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    "content",
    [
        claiming(8 * 2**30 - 1),
        claiming(8 * 2**30 - 1, tarfile.GNUTYPE_LONGNAME) + bytes(1024),
        claiming(8 * 2**30 - 1, tarfile.XHDTYPE) + bytes(1024),
        sparse(),
        gzip.compress(claiming(100_000_000) + bytes(100_000_000)),
    ],
    ids=["member", "long name", "extended header", "sparse", "gzip"],
)
def test_an_archive_that_claims_gigabytes_is_left(content):
    with pytest.raises(tarfile.ReadError, match="claims .* MB, and one of a pair has at most 64 MB"):
        [*read_members(io.BytesIO(content))]


def test_a_key_without_end_stays_small(tmp_path):
    """A pair of a thousand files: what is too much for a pair stays out, and the next pair is read."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in [f"0.{number}.png" for number in range(1000)] + ["1.json"]:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    (shard,) = find_shards(tmp_path)
    pairs = [*shard.read()]
    assert [(pair.key, len(pair.files)) for pair in pairs] == [("0", 16), ("1", 1)]


@pytest.mark.parametrize(
    "content",
    ['{"complete": true}', '{"complete": true, "shards": []}', '{"complete": true, "shards": {"a.tar": "x"}}',
     '{"complete": true, "shards": {"a.tar": -1}}', "[" * 100_000, "[]", '{"complete": true, "shards": {"a": 1e400}}'],
)  # fmt: skip
def test_an_index_without_shards_is_named(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        find_shards(tmp_path)
