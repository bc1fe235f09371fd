"""Read a tar archive of training pairs as a stream, of which no header may claim more than a pair can have."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO

from ..limits import MAX_PAIR_FILE_BYTES


class _BoundedTarInfo(tarfile.TarInfo):
    """A header whose size is checked before anything behind it is read, long names and extensions included."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        """Parse a header of 512 bytes; tarfile.ReadError if it claims too much."""
        header = super().frombuf(buf, encoding, errors)
        _check_size(header)
        return header


def read_members(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each file in an archive, packed or not.

    Args:
        stream: The archive, which is read once from its beginning to its end.

    Raises:
        tarfile.TarError: It is damaged, or a file in it claims to be larger than any of a pair.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_BoundedTarInfo) as archive:
        for member in archive:
            setattr(archive, "members", [])  # noqa: B010 - no stub has it; all headers would stay in memory
            if not member.isreg():
                continue
            _check_size(member)  # once more, as an extended or sparse header can change it
            file = archive.extractfile(member)
            assert file is not None  # a regular file
            yield member.name, file.read()


def _check_size(member: tarfile.TarInfo) -> None:
    if not 0 <= member.size <= MAX_PAIR_FILE_BYTES:
        raise tarfile.ReadError(
            f"a file in it claims {member.size / 1e6:.0f} MB, and one of a pair has at most "
            f"{MAX_PAIR_FILE_BYTES / 1e6:.0f} MB"
        )
