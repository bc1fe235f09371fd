"""Shards of training pairs: write them, read them, and find those that a source names.

A *shard* is a tar archive of pairs as webdataset writes it, which can be streamed from a bucket as well. Pairs that lie
in a folder as single files are read in the same way.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..atomic import atomic_file
from ..extras import import_extra
from ..limits import MAX_COUNT, MAX_INDEX_BYTES, MAX_PAIR_FILES, MAX_SHARDS
from ..plain_data import parse_json, read_bytes, validate, whole_number
from .bounded_tar import read_members
from .pairs import EncodedPair, Pair, encode_pair

Count = Annotated[int, whole_number(0, MAX_COUNT)]

INDEX_NAME = "index.json"  # lists the shards that blip-qformer prepare wrote

# What a source may do besides reading files; a run's file is data, so that only the one who starts the run allows it.
URLS, COMMANDS = "urls", "commands"
ALLOWED = (URLS, COMMANDS)

LETTERS = 52  # the longest range of letters, {A..z}
_BRACES = re.compile(
    r"\{(?P<first>-?\d+)\.\.(?P<last>-?\d+)(?:\.\.-?\d+)?\}|(?P<letters>\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\})|[{},]"
)

# Two letters at least, or Windows' C:// would be one.
_SCHEME = re.compile(r"\s*(?:(pipe):|([A-Za-z][A-Za-z0-9+.-]+)://)", re.IGNORECASE)


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
        url: Its path; or where it is, as webdataset opens it, if that is not on this machine.
        count: The number of pairs, if known.
    """

    url: str
    count: int | None = None

    def read(self) -> Iterator[EncodedPair]:
        """Yield every pair, its files as bytes."""
        with _open(self.url) as stream:
            for key, group in itertools.groupby(read_members(stream), key=lambda member: _split_name(member[0])[0]):
                # A key that never ends would fill the memory: what is too much for a pair stays out of it.
                members = itertools.islice(group, MAX_PAIR_FILES)
                yield EncodedPair(key, {_split_name(name)[1]: data for name, data in members}, f"{self.url}: {key}")


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


def find_shards(source: str | Path, allow: Collection[str] = ()) -> list[Shard]:
    """Find the shards that a source names; whether a remote shard exists is not checked.

    Args:
        source: A folder, an index, a shard or a pattern of shards, as in :class:`~.stream.PairStream`.
        allow: What the source may do besides reading files: :data:`URLS` fetches shards from servers, :data:`COMMANDS`
            runs the shell command of a ``pipe:``.

    Returns:
        The shards, in the order of their names.

    Raises:
        ValueError: Nothing is there, the index is not complete, or the source needs what is not allowed.
    """
    text = str(source)
    if is_remote(text):
        _check_allowed(text, allow)
        if text.endswith(INDEX_NAME) and not _is_command(text):
            return _list_index(text)
        urls = expand_braces(text)
        for url in urls:  # braces can hold a scheme
            _check_allowed(url, allow)
        return [TarShard(url) for url in urls]
    if _scheme(text) == "file":
        text = url2pathname(urlsplit(text).path)
    if text.endswith(INDEX_NAME):
        return _list_index(text)
    folder = Path(text)
    if not folder.is_dir():
        files = _matching_files(text)
        if not files:
            raise ValueError(f"There is no folder and no shard {text}: give a folder of pairs, shards or a pattern.")
        return [_local_shard(file) for file in files]
    if (folder / INDEX_NAME).is_file():
        return _list_index(str(folder / INDEX_NAME))
    if archives := sorted(folder.glob("*.tar")):
        return [_local_shard(file) for file in archives]
    if pairs := _list_files(folder):
        return [FileShard(pairs)]
    raise ValueError(f"{folder} holds neither shards (*.tar) nor pairs (*.subject.webp, *.target.webp, *.json).")


def is_remote(source: str) -> bool:
    """Return whether a source is a URL or a command, and not a path or a ``file:`` URL of this machine."""
    return _scheme(source) not in ("", "file") or bool(_scheme(source) and urlsplit(source).netloc)


def expand_braces(pattern: str) -> list[str]:
    r"""Write out ``{000..002}`` and ``{a,b}``; a backslash is one, as in ``C:\data\{000..002}.tar``.

    Raises:
        ValueError: There are more than :data:`MAX_SHARDS`, or braces that do not belong together.
    """
    # Counted first, as braceexpand writes a whole range into the memory at once.
    if _count_names(pattern) > MAX_SHARDS:
        raise ValueError(f"{pattern[:200]} stands for more than {MAX_SHARDS:,} shards: write a smaller range.")
    return list(import_extra("braceexpand", "Reading shards").braceexpand(pattern, escape=False))


def _count_names(pattern: str) -> float:
    """Return how many names a pattern stands for, or a little more where ranges have steps."""
    open_braces = [(0.0, 1.0)]  # of each: the names of its alternatives before, and of the one that is being read
    for token in _BRACES.finditer(pattern):
        before, here = open_braces.pop()
        if token["first"]:
            open_braces.append((before, here * (abs(float(token["last"]) - float(token["first"])) + 1)))
        elif token["letters"]:
            open_braces.append((before, here * LETTERS))
        elif token[0] == "{":
            open_braces += [(before, here), (0.0, 1.0)]
        elif token[0] == "," and open_braces:
            open_braces.append((before + here, 1.0))
        elif token[0] == "}" and open_braces:
            outer_before, outer = open_braces.pop()
            open_braces.append((outer_before, outer * (before + here)))
        else:
            open_braces.append((before, here))
    return math.prod(sum(each) for each in open_braces)


def _matching_files(pattern: str) -> list[Path]:
    """Return the files that match a pattern; folders that exist are meant literally, as ``[best]`` in a name is."""
    path = Path(pattern)
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    if path.is_file():
        return [path]
    rest = os.fspath(path.relative_to(folder))
    return [folder / name for each in expand_braces(rest) for name in sorted(glob.glob(each, root_dir=folder))]


def _check_allowed(source: str, allow: Collection[str]) -> None:
    """Refuse a source that would run a command or fetch a URL, unless that is allowed."""
    needed = COMMANDS if _is_command(source) else URLS
    if is_remote(source) and needed not in allow:
        does = "runs a command of the shell" if needed == COMMANDS else "is fetched from a server"
        raise ValueError(
            f'"{source}" {does}, which a source of pairs may do only if you say so: start the run with '
            f"--allow {needed} if you trust it, or name files on this machine."
        )


def _is_command(source: str) -> bool:
    return _scheme(source) == "pipe"


def _scheme(source: str) -> str:
    """Return the scheme of a URL in small letters; empty for a path."""
    found = _SCHEME.match(source)
    return (found[1] or found[2]).lower() if found else ""


def _list_index(index: str) -> list[Shard]:
    """List the shards that an index names; they lie beside it.

    Raises:
        ValueError: The index does not exist, is not complete, or was not written by blip-qformer prepare.
    """
    remote = is_remote(index)
    if remote:
        with _open(index) as file:
            content = parse_json(file.read(MAX_INDEX_BYTES), index)
    elif Path(index).is_file():
        content = parse_json(read_bytes(Path(index), MAX_INDEX_BYTES), index)
    else:
        raise ValueError(f"{index} is not there: make it with blip-qformer prepare.")
    if not isinstance(content, dict) or "complete" not in content:
        raise ValueError(
            f"{index} does not list shards of blip-qformer prepare: name the shards themselves, as a pattern."
        )
    if not content["complete"]:
        raise ValueError(f"{index} is not complete: run the same blip-qformer prepare again, it goes on where it was.")
    shards = validate(dict[str, Count], content.get("shards"), f'The entry "shards" of {index}')
    counts = {name: count for name, count in shards.items() if count}
    if elsewhere := [name for name in counts if not _is_plain_name(name)]:
        raise ValueError(f'{index} names "{elsewhere[0]}", and shards lie beside their index: correct it.')
    if remote:
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
    return TarShard(os.fspath(path.absolute()), count)


def _is_plain_name(name: str) -> bool:
    """Return whether a name is that of a file in the same folder, on any system."""
    return not set(name).intersection('/\\:"|<>\0') and name not in ("", ".", "..")


def _open(url: str) -> IO[bytes]:
    """Open a path, or what webdataset opens by a URL or a command."""
    return import_extra("webdataset.gopen", "Reading shards").gopen(url) if is_remote(url) else open(url, "rb")


def _split_name(name: str) -> tuple[str, str]:
    """Split a file's name into the pair's key and a suffix, which begins at the first dot as in webdataset."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()
