"""Write a file or a folder whole or not at all.

Content goes to a temporary name beside the target, is flushed to the disk, and is renamed when it is complete. After a
failure, Ctrl-C included, the target is as it was before and the temporary name is gone.

Only a process that is killed leaves temporary names behind. Each write holds a lock as long as it runs, which the
system frees when its process ends; so the next write in the folder can tell them from those of running writes, and
removes them (:func:`remove_partial`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

PARTIAL = ".partial"
LOCK, MOVES, OLD = ".lock", ".moves", ".old"
FOLDER_LOCK = ".in-use.lock"
KEY = re.compile(r"\.[0-9a-f]+")  # of a write, as :func:`_temporary_key` makes it

# Temporary names without a lock: of earlier versions, or on a file system that knows no locks.
MAX_AGE = 24 * 3600  # seconds since anything in them was written

LONG_PATH = 230  # characters; Windows knows 260, and calls what is longer not found

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def atomic_file(path: Path, clean: bool = True) -> Iterator[Path]:
    """Write a file under a temporary name and rename it at the end of the block; on failure remove it.

    Args:
        path: The file to make or to replace; its folder must exist.
        clean: Whether to remove first what killed processes left in the folder. It lists the folder, so that who
            writes many files into a large one removes it once, with :func:`remove_partial`.

    Yields:
        The temporary name, at which nothing exists yet.

    Raises:
        OSError: The file cannot be written; the message names it and says what to do.
    """
    with atomic_files([path], clean) as (temporary,):
        yield temporary


@contextmanager
def atomic_files(paths: Sequence[Path], clean: bool = True) -> Iterator[list[Path]]:
    """Write files that belong together: all of them are exchanged, or none.

    A process that is killed between two renames leaves a list of them, and the next write in that folder does the rest.

    Args:
        paths: The files to make or to replace, all in one folder, which must exist.
        clean: As for :func:`atomic_file`.

    Yields:
        The temporary names, at which nothing exists yet.

    Raises:
        OSError: A file cannot be written; the message names it and says what to do.
    """
    folder = paths[0].parent
    with readable_errors(paths[0]), _temporary_key(folder, clean) as key:
        # Files, even for several: the host must not see a folder come and go among its models.
        temporaries = [folder / f".{key}.{number}{PARTIAL}" for number in range(len(paths))]
        moves = folder / f".{key}{PARTIAL}{MOVES}"
        try:
            yield temporaries
            for temporary in temporaries:
                flush(temporary)
            if len(paths) > 1:
                _write_moves(moves, {old.name: new.name for old, new in zip(temporaries, paths, strict=True)})
            _exchange(temporaries, paths)
        finally:
            moves.unlink(missing_ok=True)
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)  # after the rename there is none


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name and rename it at the end of the block; on failure remove it.

    A folder that exists is replaced when the new one is complete. If the process is killed at the very moment of the
    exchange, the old one has a hidden name until the next write beside it, which brings it back.

    Args:
        path: The folder to make or to replace; its parents are made if missing.

    Yields:
        The temporary folder, which is empty.

    Raises:
        OSError: The folder cannot be written; the message names it and says what to do.
    """
    with readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_key(path.parent, clean=True) as key:
            temporary = path.with_name(f".{key}.0{PARTIAL}")
            try:
                temporary.mkdir()
                yield temporary
                flush(temporary)
                _replace_folder(temporary, path, key)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is none


def make_folder(folder: Path) -> None:
    """Make a folder for what takes long to compute, and find out beforehand whether it can be written to.

    Args:
        folder: The folder; its parents are made too.

    Raises:
        OSError: It cannot be made or written to; the message names it and says what to do.
    """
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_key(folder, clean=True):
            pass


@contextmanager
def only_writer(folder: Path, command: str, wait: float = 0) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder during the block.

    Args:
        folder: The folder; it is made if missing.
        command: What writes into it, for the message.
        wait: Seconds to wait for another process. One that was killed holds the folder until the processes that it
            forked have ended too.

    Raises:
        ValueError: Another process is writing into the folder.
        OSError: The folder cannot be written to.
    """
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FOLDER_LOCK
        lock = _lock(path, wait)
    if lock is None:
        raise ValueError(
            f"Another {command} is writing into {folder}: wait until it has ended, or choose another folder."
        )
    try:
        yield
    finally:
        _unlock(lock, path)


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


def remove_partial(folder: Path, exclusive: bool = False) -> None:
    """Remove what killed processes left in a folder, after an exchange that they had begun was brought to its end.

    Nothing is touched that a running write holds.

    Args:
        folder: The folder; one that does not exist holds nothing.
        exclusive: Whether this process is the :func:`only_writer` of the folder, so that a temporary name without a
            lock is nobody's. Otherwise such a name is removed when it is a day old.
    """
    for mark in folder.glob(f".*{PARTIAL}{LOCK}"):
        if not KEY.fullmatch(mark.name.removesuffix(f"{PARTIAL}{LOCK}")):
            continue  # not ours, and as a pattern it could name what is
        with suppress(OSError):  # another user's, which is not for us to remove
            _clear(mark)
    for path in folder.glob(f".*{PARTIAL}"):
        key = f".{path.name.split('.')[1]}"
        if not (folder / f"{key}{PARTIAL}{LOCK}").exists() and (exclusive or _age(path) > MAX_AGE):
            with suppress(OSError):
                _remove(path)


@contextmanager
def _temporary_key(folder: Path, clean: bool) -> Iterator[str]:
    """Yield a key for temporary names in a folder, with a lock on it; without the target's name, which may be long."""
    if clean:
        remove_partial(folder)
    key = secrets.token_hex(6)  # short: Windows counts a path's characters
    mark = folder / f".{key}{PARTIAL}{LOCK}"
    if not folder.is_dir():  # the lock would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), mark)
    lock = _lock(mark)
    try:
        yield key
    finally:
        if lock is not None:
            _unlock(lock, mark)


def _clear(mark: Path) -> None:
    """Bring to an end what a killed write left, whose lock's file is given; nothing if the write is running."""
    lock = _lock(mark)
    if lock is None or not lock.is_locked:
        return
    folder, key = mark.parent, mark.name.removesuffix(f"{PARTIAL}{LOCK}")
    _finish_moves(folder / f"{key}{PARTIAL}{MOVES}")
    _restore_folder(folder, key)
    for path in folder.glob(f"{key}.*{PARTIAL}"):
        _remove(path)
    _unlock(lock, mark)


def _lock(path: Path, wait: float = 0) -> BaseFileLock | None:
    """Lock a file, which is made if missing.

    Returns:
        The lock, which is not locked where the file system knows no locks; None if another holds it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
    return lock


def _unlock(lock: BaseFileLock, path: Path) -> None:
    """Remove a lock's file and free the lock."""
    with suppress(OSError):  # Windows does not remove an open file
        path.unlink()
    lock.release()
    with suppress(OSError):  # another process may hold it by now, on Windows
        if os.name == "nt":
            path.unlink()


def _exchange(temporaries: Sequence[Path], paths: Sequence[Path]) -> None:
    """Rename files to their paths; if a rename fails, because a file is in use, those before it are taken back."""
    backups = [temporary.with_name(f"{temporary.stem}{OLD}{PARTIAL}") for temporary in temporaries]
    done: list[tuple[Path, Path, bool]] = []  # a path, the second name of what was there, and whether anything was
    try:
        for temporary, path, backup in zip(temporaries, paths, backups, strict=True):
            existed = path.exists()
            if existed and len(paths) > 1:
                with suppress(OSError):  # the file system knows no second names: then this one stays the new one
                    os.link(path, backup)
            os.replace(temporary, path)
            done.append((path, backup, existed))
    except BaseException:
        for path, backup, existed in done:
            if backup.exists():
                os.replace(backup, path)
            elif not existed:
                path.unlink()
        raise
    finally:
        for backup in backups:
            backup.unlink(missing_ok=True)


def _replace_folder(new: Path, path: Path, key: str) -> None:
    """Rename a folder to a path; a folder that has that path comes back if the rename fails."""
    old = path.with_name(f".{key}.{path.name}{OLD}")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore_folder(folder: Path, key: str) -> None:
    """Bring back a folder that a killed exchange had moved away; one whose successor is there is removed."""
    for old in folder.glob(f"{key}.*{OLD}"):
        path = folder / old.name.removeprefix(f"{key}.").removesuffix(OLD)
        if path.exists():
            _remove(old)
        else:
            os.replace(old, path)


def _write_moves(file: Path, moves: dict[str, str]) -> None:
    """Write down which files are about to be renamed; a list that is cut off is no JSON and counts as none."""
    file.write_text(json.dumps(moves), encoding="utf-8")
    flush(file)


def _finish_moves(file: Path) -> None:
    """Do the renames that a killed exchange had still to do; none if it had not begun."""
    folder, key = file.parent, file.name.removesuffix(f"{PARTIAL}{MOVES}")
    try:
        moves = {str(old): str(new) for old, new in dict(json.loads(file.read_text(encoding="utf-8"))).items()}
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        moves = {}
    for old, new in moves.items():
        # The list may be another's work: it renames files of this exchange, within the folder, and nothing else.
        own = old.startswith(f"{key}.") and old.endswith(PARTIAL) and {old, new}.isdisjoint({"", ".", ".."})
        if own and not {"/", "\\"}.intersection(old + new) and (folder / old).is_file():
            os.replace(folder / old, folder / new)
    file.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Return the seconds since a file, or anything in a folder, was last written."""
    times = []
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        with suppress(OSError):  # gone meanwhile
            times.append(each.lstat().st_mtime)
    return time.time() - max(times, default=time.time())


def _is_temporary(path: Path) -> bool:
    """Return whether a path is a temporary name, or in a folder that has one."""
    return any(part.startswith(".") and PARTIAL in part for part in path.parts)


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Say of a failed write which file it was and what to do; errors about other files pass.

    Args:
        path: The file or folder that is written inside.

    Raises:
        OSError: It cannot be written; the message names it and says what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or _is_temporary(path):  # or the write around this one says it
            raise
        other = Path(error.filename) if error.filename else path
        if not _is_temporary(other) and path not in (other, other.parent) and other not in path.parents:
            raise
        reason = error.strerror or type(error).__name__
        if error.errno in NO_ROOM:
            remedy = "make room on that disk or choose another folder, and run it again"
        elif error.errno in NOT_ALLOWED:
            remedy = "you may not write there, or another program has it open: close that, or choose another folder"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            remedy = "a file is in the way: choose another folder"
        elif error.errno == errno.ENOENT and not path.parent.is_dir():
            remedy = f"the folder {path.parent} is not there: create it, or choose another one"
        elif error.errno == errno.ENAMETOOLONG or (error.errno == errno.ENOENT and len(str(path)) > LONG_PATH):
            remedy = "choose a shorter name, or a folder with a shorter path"
        else:
            raise
        raise type(error)(f"{path} could not be written ({reason}): {remedy}.") from error
