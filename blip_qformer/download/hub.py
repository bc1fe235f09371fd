"""Files of a repository of the Hugging Face Hub: listed, and fetched whole with their checksum.

huggingface_hub does the requests, and with it ``HF_ENDPOINT``, ``HF_TOKEN`` and the proxies of the environment. What it
leaves open is done here: a file goes on where it broke off even if the process ended, its SHA-256 is compared, and what
goes wrong is one sentence. Its :func:`~huggingface_hub.file_download.http_get` is called and not ``hf_hub_download``,
which in most versions reports its progress to nobody, and so cannot be cancelled either.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from ..atomic import flush, readable_errors
from ..limits import MAX_DOWNLOAD_BYTES

ENDPOINT = constants.ENDPOINT  # HF_ENDPOINT, or huggingface.co

INCOMPLETE = ".incomplete"
LISTING_TIMEOUT = 30  # seconds
ATTEMPTS, PAUSE = 2, 1.0  # calls in a row that bring nothing, each of several requests, and seconds between two
BLOCK = 1 << 20  # bytes hashed at once

MAX_NAME = 255  # characters of a path in a repository
UNSAFE = re.compile(r'[\\:*?"<>|\x00-\x1f]')  # \\ and : lead elsewhere on Windows, and the rest is in no name there
SHA256 = re.compile(r"[0-9a-f]{64}")

#: Packages by which versions of huggingface_hub make their requests: their errors have no common class.
HTTP_PACKAGES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")

AGAIN = "run it again, and it goes on where it was"

#: What to do about an answer of the server, by its status.
REMEDIES = {
    401: "it is not there (any more), or not for everybody: log in with hf auth login, or set HF_TOKEN",
    403: "log in with hf auth login, or set HF_TOKEN to a token that may read it; a proxy may refuse it too",
    404: "it is not there (any more); with HF_ENDPOINT set, the mirror may not have it: unset that",
    416: "the file on the server has another size than its listing says: try again later",
    429: f"too many requests came from your address: wait some minutes, or log in with hf auth login; then {AGAIN}",
}


class DownloadError(ValueError):
    """A file could not be downloaded; the message is a sentence with what to do."""


class ConnectionLostError(DownloadError):
    """The server could not be reached, or the connection broke off."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Args:
        repository: ``owner/name``.
        commit: The commit that the file belongs to.
        name: Path in the repository, with ``/``.
        size: Size in bytes.
        sha256: Checksum; None for small files, which git keeps itself.
    """

    repository: str
    commit: str
    name: str
    size: int
    sha256: str | None


def list_files(repository: str) -> list[RemoteFile]:
    """Ask the Hub for the files of a model's newest commit.

    Args:
        repository: ``owner/name``.

    Raises:
        DownloadError: The Hub cannot be reached, or refuses.
    """
    if not ENDPOINT.startswith(("http://", "https://")):
        raise DownloadError(
            f"HF_ENDPOINT is {ENDPOINT!r}, which is no address: write one such as https://huggingface.co, or unset it."
        )
    nonsense = (
        f"{ENDPOINT} answered for {repository} with something that is no listing of files, such as the page of a "
        "login: open it in a browser, use another mirror, or unset HF_ENDPOINT."
    )
    with _sentences(f"{repository} at {ENDPOINT}"):
        try:
            info = HfApi(endpoint=ENDPOINT).model_info(repository, files_metadata=True, timeout=LISTING_TIMEOUT)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DownloadError(nonsense) from error
    files = []
    for sibling in info.siblings or ():
        if sibling.size is None or info.sha is None:
            raise DownloadError(
                f"{ENDPOINT} lists {repository} without sizes, so that a download could not be checked: use another "
                "mirror, or unset HF_ENDPOINT."
            )
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        if not (_is_safe(sibling.rfilename) and _is_size(sibling.size) and _is_digest(sha256)):
            raise DownloadError(nonsense)
        files.append(RemoteFile(repository, info.sha, sibling.rfilename, sibling.size, sha256))
    return files


def _is_safe(name: object) -> bool:
    """Return whether a name stays inside its folder on every system, and names a file there."""
    if not isinstance(name, str) or len(name) > MAX_NAME:
        return False
    return all(part not in ("", ".", "..") and not UNSAFE.search(part) for part in name.split("/"))


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size <= MAX_DOWNLOAD_BYTES


def _is_digest(sha256: object) -> bool:
    return sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None)


def fetch_file(file: RemoteFile, folder: Path, progress: Callable[[int], object]) -> Path:
    """Fetch a file into a folder; what is there already of it is kept, and the rest is fetched.

    Args:
        file: The file.
        folder: The folder that stands for the repository.
        progress: A function called with each number of bytes that came, at first with those that were there. A file
            that has to begin anew gives a negative number. What it raises ends the download, which can go on later.

    Returns:
        The path, where the file is whole.

    Raises:
        DownloadError: It could not be fetched, or is not what the Hub's listing says.
        OSError: It cannot be written.
    """
    path = folder / file.name
    if is_whole(path, file):
        progress(file.size)
        return path
    partial = path.with_name(path.name + INCOMPLETE)
    with readable_errors(partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists() and partial.stat().st_size > file.size:
            partial.unlink()  # of another commit
        try:
            with _Partial(partial, file, progress) as opened:
                progress(opened.tell())
                _fetch_rest(file, opened)
        except _TooLongError:
            partial.unlink()
            raise
        _check(file, partial)
        flush(partial)  # its name says that it is whole, after a power cut too
        partial.replace(path)
    return path


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Return whether a file is there in its size; under its own name it has only ever been with its checksum.

    Args:
        path: Where the file would be.
        file: The file.
    """
    return path.is_file() and path.stat().st_size == file.size


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class _TooLongError(DownloadError):
    """A server sends more than it has listed."""


class _Partial(io.FileIO):
    """A file that grows at its end, up to a size, and tells of each number of bytes."""

    def __init__(self, path: Path, file: RemoteFile, progress: Callable[[int], object]) -> None:
        super().__init__(path, "ab")
        self._file, self._progress = file, progress

    def write(self, data: bytes, /) -> int:  # pyright: ignore
        """Write all of the data, which FileIO alone does not promise.

        Raises:
            _TooLongError: More comes than is listed, as from a server that never stops.
        """
        if self.tell() + len(data) > self._file.size:
            raise _TooLongError(
                f"{self._file.name} of {self._file.repository} came with more than the {self._file.size} bytes that "
                "are listed: it was changed on its way and is removed. Use another network or mirror (HF_ENDPOINT)."
            )
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest) :]
        self._progress(len(data))
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        """Cut the file; huggingface_hub does so where a server begins anew although it was asked to go on."""
        kept = self.tell() if size is None else size
        before = self.seek(0, io.SEEK_END)
        super().truncate(kept)
        self.seek(kept)
        self._progress(kept - before)
        return kept


def _fetch_rest(file: RemoteFile, opened: _Partial) -> None:
    """Fetch what lacks, in as many requests as it takes, as long as those that break off have brought something."""
    url = hf_hub_url(file.repository, file.name, revision=file.commit, endpoint=ENDPOINT)
    failures = 0
    while (begin := opened.tell()) < file.size:
        try:
            with _sentences(f"{file.name} of {file.repository}"), _no_bars():
                http_get(url, opened, resume_size=begin, headers=build_hf_headers())
        except ConnectionLostError:
            failures = 0 if opened.tell() > begin else failures + 1
            if failures == ATTEMPTS:
                raise
            time.sleep(PAUSE)
            continue
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise DownloadError(
                f"{file.name} of {file.repository} came with headers that make no sense ({error}): use another "
                "mirror, or unset HF_ENDPOINT."
            ) from error
        if opened.tell() == begin:
            raise DownloadError(
                f"{file.name} of {file.repository} ends after {begin} bytes, and {file.size} are listed: {AGAIN}, or "
                "try again later."
            )


def _check(file: RemoteFile, partial: Path) -> None:
    """Refuse a file of another content than the listed one, and remove it, as nothing can be made of it."""
    if file.sha256 is None or (found := sha256_of(partial)) == file.sha256:
        return
    partial.unlink()
    raise DownloadError(
        f"{file.name} of {file.repository} came with the SHA-256 {found}, and {file.sha256} is listed: it was changed "
        "or damaged on its way and is removed. Run it again; if it comes so once more, use another network or mirror "
        "(HF_ENDPOINT)."
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep huggingface_hub from showing a bar of its own beside ours."""
    name = "huggingface_hub.http_get"
    shown = not are_progress_bars_disabled(name)
    if shown:
        disable_progress_bars(name)
    try:
        yield
    finally:
        if shown:
            enable_progress_bars(name)


@contextmanager
def _sentences(what: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP package raise into a sentence; anything else passes."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise DownloadError(
            f"{what} was not downloaded, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it, or "
            "download on another machine."
        ) from error
    except Exception as error:
        # huggingface_hub says by an OSError without a number that less came than the server had announced.
        is_short = type(error) is OSError and error.errno is None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if not is_short and status is None and type(error).__module__.partition(".")[0] not in HTTP_PACKAGES:
            raise
        if status is not None:
            remedy = REMEDIES.get(status, f"try again later; then {AGAIN}")
            raise DownloadError(
                f"{what} was not downloaded, because the server answered {status}: {remedy}."
            ) from error
        reason = "the server stopped sending" if _is_read_timeout(error) else "the connection failed or broke off"
        raise ConnectionLostError(
            f"{what} was not downloaded, because {reason} ({type(error).__name__}): look at your network, or set "
            f"HF_ENDPOINT to a mirror; {AGAIN}."
        ) from error


def _is_read_timeout(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was made of, is a read timeout by its name; classes differ by version."""
    while error is not None:
        if any("ReadTimeout" in each.__name__ for each in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False
