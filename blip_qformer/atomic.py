"""Write a file or a folder whole or not at all.

Content goes to a temporary name beside the target, is flushed to the disk, and is renamed when it is complete. After a
failure, Ctrl-C included, the target is as it was before and the temporary name is gone. Only a process that is killed
leaves one behind; :func:`remove_partial` clears it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name and rename it at the end of the block; on failure remove it.

    Args:
        path: The file to make or to replace; its folder must exist.

    Yields:
        The temporary name, at which nothing exists yet.
    """
    temporary = _temporary_name(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after the rename there is none


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name and rename it at the end of the block; on failure remove it.

    A folder that exists is replaced when the new one is complete. If the process is killed at the very moment of the
    exchange, both lie beside each other under hidden names.

    Args:
        path: The folder to make or to replace; its parents are made if missing.

    Yields:
        The temporary folder, which is empty.
    """
    temporary = _temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        flush(temporary)
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is none


def shared_partial(path: Path) -> Path:
    """Return the temporary name of a target that several processes write together, the same in each of them."""
    return path.with_name(f".{path.name}{PARTIAL}")


def publish_folder(path: Path) -> None:
    """Rename a complete folder from its :func:`shared_partial` name to its own; one process does it for all.

    Unlike :func:`atomic_folder`, it replaces nothing and does not flush: each process has flushed its files already.

    Args:
        path: The folder; nothing may exist there.
    """
    shared_partial(path).rename(path)


def flush(path: Path) -> None:
    """Force a file, or every file in a folder, onto the disk."""
    files = (each for each in path.rglob("*") if each.is_file()) if path.is_dir() else (path,)
    for file in files:
        with file.open("rb+") as stream:  # Windows flushes only what is open for writing
            os.fsync(stream.fileno())


def remove_folder(path: Path) -> None:
    """Remove a folder; if the process is killed meanwhile, what remains has a temporary name."""
    shutil.rmtree(path.rename(shared_partial(path)))


def remove_partial(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    """Return an unused name beside a path; without the path's own name, which may be as long as a name can be."""
    return path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")


def _replace_folder(new: Path, path: Path) -> None:
    """Rename a folder to a path; a folder that has that path comes back if the rename fails."""
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
