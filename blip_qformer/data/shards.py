"""Shards of training pairs: write them, read them, and find those that a source names.

A *shard* is a tar archive of pairs as webdataset writes it, which can be streamed from a bucket as well. Pairs that lie
in a folder as single files are read in the same way.
"""

from __future__ import annotations

import glob
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..atomic import atomic_file
from ..extras import import_extra
from .pairs import EncodedPair, Pair, encode_pair

INDEX_NAME = "index.json"  # lists the shards that blip-qformer prepare wrote


def write_shard(path: Path, pairs: Iterable[Pair]) -> int:
    """Write pairs into one tar archive, whole or not at all; the same pairs give the same bytes.

    Args:
        path: The archive to write.
        pairs: The pairs, each with a key of its own.

    Returns:
        The number of pairs.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
        ValueError: webdataset is missing, or two pairs have the same key.
    """
    webdataset = import_extra("webdataset", "Writing shards")
    keys: set[str] = set()
    with (
        atomic_file(path) as temporary,
        temporary.open("xb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0) as archive,
    ):
        for pair in pairs:
            if pair.key in keys:
                raise ValueError(f'Two pairs of {path.name} have the key "{pair.key}": a key must be unique.')
            keys.add(pair.key)
            archive.write({"__key__": pair.key, **encode_pair(pair)})
    return len(keys)


@dataclass(frozen=True)
class TarShard:
    """A tar archive of pairs.

    Args:
        url: Where it is, as webdataset opens it.
        count: The number of pairs, if known.
    """

    url: str
    count: int | None = None

    def read(self) -> Iterator[EncodedPair]:
        """Yield every pair, its files as bytes."""
        with _open_url(self.url) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            members = (member for member in archive if member.isreg())
            for key, group in itertools.groupby(members, key=lambda member: _split_name(member.name)[0]):
                files = {}
                for member in group:
                    file = archive.extractfile(member)
                    assert file is not None  # a regular file
                    files[_split_name(member.name)[1]] = file.read()
                yield EncodedPair(key, files, f"{self.url}: {key}")


@dataclass(frozen=True)
class FileShard:
    """Pairs that are single files in a folder.

    Args:
        pairs: The pairs, each with the paths of its files.
    """

    pairs: Sequence[EncodedPair]

    @property
    def count(self) -> int:
        """The number of pairs."""
        return len(self.pairs)

    def read(self) -> Iterator[EncodedPair]:
        """Yield every pair; no file is opened."""
        return iter(self.pairs)


Shard = TarShard | FileShard


def find_shards(source: str | Path) -> list[Shard]:
    """Find the shards that a source names; whether a remote shard exists is not checked.

    Args:
        source: A folder, an index, a shard or a pattern of shards, as in :class:`~.stream.PairStream`.

    Returns:
        The shards, in the order of their names.

    Raises:
        ValueError: Nothing is there, or the index is not complete.
    """
    text = str(source)
    if text.endswith(INDEX_NAME):
        return _list_index(text)
    if "://" in text or text.startswith("pipe:"):
        return [TarShard(url) for url in _expand_braces(text)]
    folder = Path(text)
    if not folder.is_dir():
        files = [file for pattern in _expand_braces(text) for file in sorted(glob.glob(pattern))]
        if not files:
            raise ValueError(f"There is no folder and no shard {text}: give a folder of pairs, shards or a pattern.")
        return [_local_shard(Path(file)) for file in files]
    if (folder / INDEX_NAME).is_file():
        return _list_index(str(folder / INDEX_NAME))
    if archives := sorted(folder.glob("*.tar")):
        return [_local_shard(file) for file in archives]
    if pairs := _list_files(folder):
        return [FileShard(pairs)]
    raise ValueError(f"{folder} holds neither shards (*.tar) nor pairs (*.subject.webp, *.target.webp, *.json).")


def _list_index(index: str) -> list[Shard]:
    """List the shards that an index names; they lie beside it.

    Raises:
        ValueError: The index does not exist, is not complete, or was not written by blip-qformer prepare.
    """
    is_remote = "://" in index
    if is_remote:
        with _open_url(index) as file:
            content = json.load(file)
    elif Path(index).is_file():
        content = json.loads(Path(index).read_bytes())
    else:
        raise ValueError(f"{index} is not there: make it with blip-qformer prepare.")
    if not isinstance(content, dict) or "complete" not in content:
        raise ValueError(
            f"{index} does not list shards of blip-qformer prepare: name the shards themselves, as a pattern."
        )
    if not content["complete"]:
        raise ValueError(f"{index} is not complete: run the same blip-qformer prepare again, it goes on where it was.")
    counts = {name: count for name, count in content["shards"].items() if count}
    if is_remote:
        folder = index.removesuffix(INDEX_NAME)
        return [TarShard(folder + name, count) for name, count in counts.items()]
    return [_local_shard(Path(index).parent / name, count) for name, count in counts.items()]


def _list_files(folder: Path) -> list[EncodedPair]:
    """List the pairs whose files lie in a folder."""
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        key, suffix = _split_name(file.name)
        if key and suffix.partition(".")[0] in ("subject", "target", "json"):
            files.setdefault(key, {})[suffix] = file
    return [EncodedPair(key, files_of_pair, str(folder / key)) for key, files_of_pair in files.items()]


def _local_shard(path: Path, count: int | None = None) -> TarShard:
    return TarShard(path.absolute().as_uri(), count)


def _open_url(url: str) -> IO[bytes]:
    return import_extra("webdataset.gopen", "Reading shards").gopen(url)


def _expand_braces(pattern: str) -> list[str]:
    """Write out ``{000..002}`` and ``{a,b}``."""
    return list(import_extra("braceexpand", "Reading shards").braceexpand(pattern))


def _split_name(name: str) -> tuple[str, str]:
    """Split a file's name into the pair's key and a suffix, which begins at the first dot as in webdataset."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()
