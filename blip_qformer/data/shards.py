"""Training examples on disk, and the endless stream that training reads them from.

A *pair* is one example: a thing on another background, the photograph it was cut from, the word for the thing, and a
caption of the photograph. Its files are ``{key}.subject.webp``, ``{key}.target.webp`` and ``{key}.json``; they lie in a
folder, or one after the other in *shards*, tar archives as webdataset has them, which stream from a bucket as well.
"""

from __future__ import annotations

import glob
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic import atomic_file
from ..extras import import_extra
from .pairs import Pair, Sample, encode_pair

INDEX = "index.json"


def write_shard(path: Path, pairs: Iterable[Pair]) -> int:
    """Write pairs into one shard, all of them or nothing; the same pairs give the same bytes.

    Returns:
        How many there were.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
        ValueError: webdataset is missing, or two pairs have the same key.
    """
    webdataset = import_extra("webdataset", "Writing shards")
    keys: set[str] = set()
    with atomic_file(path) as temporary, temporary.open("xb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0) as archive:
            for pair in pairs:
                if pair.key in keys:
                    raise ValueError(f'Two pairs of {path.name} have the key "{pair.key}": a key must be unique.')
                keys.add(pair.key)
                archive.write({"__key__": pair.key, **encode_pair(pair)})
    return len(keys)


@dataclass(frozen=True)
class Shard:
    """A tar archive of pairs; ``count``: how many, where that is known."""

    url: str
    count: int | None = None

    def read(self) -> Iterator[Sample]:
        """Every pair in it as bytes, through webdataset's openers of URLs."""
        gopen = import_extra("webdataset.gopen", "Reading shards").gopen
        with gopen(self.url) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            files = (member for member in archive if member.isreg())
            for key, members in itertools.groupby(files, key=lambda member: _split_name(member.name)[0]):
                content = {_split_name(each.name)[1]: archive.extractfile(each).read() for each in members}
                yield Sample(key, content, f"{self.url}: {key}")


@dataclass(frozen=True)
class LoosePairs:
    """Pairs that are files in a folder."""

    samples: Sequence[Sample]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.samples)

    def read(self) -> Iterator[Sample]:
        """Where the files of each pair are; none is opened."""
        return iter(self.samples)


Part = Shard | LoosePairs


def find_parts(source: str | Path) -> list[Part]:
    """What a source names, see :class:`PairStream`; remote shards are not looked for.

    Raises:
        ValueError: nothing is there.
    """
    text = str(source)
    if text.endswith(INDEX):
        return _indexed(text)
    if "://" in text or text.startswith("pipe:"):
        return [Shard(url) for url in _expanded(text)]
    folder = Path(text)
    if not folder.is_dir():
        files = [file for pattern in _expanded(text) for file in sorted(glob.glob(pattern))]
        if not files:
            raise ValueError(f"There is no folder and no shard {text}: give a folder of pairs, shards or a pattern.")
        return [_local_shard(Path(file)) for file in files]
    if (folder / INDEX).is_file():
        return _indexed(str(folder / INDEX))
    parts: list[Part] = [_local_shard(file) for file in sorted(folder.glob("*.tar"))]
    parts = parts or [LoosePairs(_loose_pairs(folder))]
    if parts[0].count == 0:
        raise ValueError(f"{folder} holds neither shards (*.tar) nor pairs (*.subject.webp, *.target.webp, *.json).")
    return parts


def _indexed(index: str) -> list[Part]:
    """The shards that an index lists; they lie beside it.

    Raises:
        ValueError: it is not there, not complete, or not ours.
    """
    if "://" in index:
        with import_extra("webdataset.gopen", "Reading shards").gopen(index) as file:
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
    if "://" in index:
        beside = index.removesuffix(INDEX)
        return [Shard(beside + name, count) for name, count in content["shards"].items() if count]
    return [_local_shard(Path(index).parent / name, count) for name, count in content["shards"].items() if count]


def _local_shard(path: Path, count: int | None = None) -> Shard:
    return Shard(path.absolute().as_uri(), count)


def _expanded(pattern: str) -> list[str]:
    """``{000..002}`` and ``{a,b}`` written out."""
    return list(import_extra("braceexpand", "Reading shards").braceexpand(pattern))


def _loose_pairs(folder: Path) -> list[Sample]:
    """The pairs whose files lie in a folder."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        key, ending = _split_name(file.name)
        if key and ending.partition(".")[0] in ("subject", "target", "json"):
            found.setdefault(key, {})[ending] = file
    return [Sample(key, files, str(folder / key)) for key, files in found.items()]


def _split_name(name: str) -> tuple[str, str]:
    """A file's name -> the pair's key and the ending, which begins at the first dot, as webdataset has it."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}{slash}{key}", ending.lower()
