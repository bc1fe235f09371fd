"""A Hub of one's own: lists repositories, hands out files with ranges, and misbehaves where a test says so."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.utils
import pytest
from huggingface_hub import constants

COMMIT = "8a2b" * 10


class HubServer(ThreadingHTTPServer):
    """Serves ``repositories``.

    Attributes:
        repositories: ``owner/name`` -> path in the repository -> content.
        faults: Path in a repository -> a function that answers in place of the server, from the handler, the content
            and the first byte that is asked for; the first of several is used once.
        ranges: Path in a repository -> first bytes that were asked for, request by request.
        tokens: What was sent as Authorization.
        changes: Path in a repository -> what its listing says otherwise.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, list[Callable[[Any, bytes, int], None]]] = {}
        self.ranges: dict[str, list[int]] = {}
        self.tokens: list[str | None] = []
        self.changes: dict[str, dict[str, Any]] = {}
        self.released = threading.Event()

    @property
    def url(self) -> str:
        """Its address, as HF_ENDPOINT has it."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repository: str, folder: Path) -> None:
        """Serve a folder as a repository."""
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        self.repositories[repository] = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

    def listing(self, repository: str) -> dict[str, Any]:
        """What the Hub's API says of a repository."""
        siblings = []
        for name, content in self.repositories[repository].items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entry = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            siblings.append(entry | ({} if name.endswith(".json") else {"lfs": lfs}) | self.changes.get(name, {}))
        return {"_id": "1", "id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a client hangs up, which is what tests do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.tokens.append(self.headers["Authorization"])
        if path.startswith("api/models/"):
            repository = "/".join(path.split("/")[2:4])
            if repository not in self.server.repositories:
                return self.answer(self.server.changes.get(repository, {}).get("status", 404))
            return self.answer(200, json.dumps(self.server.listing(repository)).encode())
        repository, name = "/".join(path.split("/")[:2]), "/".join(path.split("/")[4:])
        content = self.server.repositories[repository][name]
        begin = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.ranges.setdefault(name, []).append(begin)
        if faults := self.server.faults.get(name):
            return faults.pop(0)(self, content, begin)
        if path.split("/")[2] == "resolve" and not name.endswith(".json"):  # as the Hub sends to its store
            return self.answer(302, Location=f"{self.server.url}/{repository}/store/{COMMIT}/{name}")
        return self.send_from(content, begin)

    def send_from(self, content: bytes, begin: int) -> None:
        """Send a file from a byte on."""
        if begin >= len(content) > 0:
            return self.answer(416)
        extra = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        return self.answer(206 if begin else 200, content[begin:], **extra)

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        """Send an answer; with a length of more than the body, the connection breaks off behind the body."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None


def broken_off(after: int) -> Callable[[Any, bytes, int], None]:
    """The connection ends after so many bytes."""
    return lambda handler, content, begin: handler.answer(
        206 if begin else 200,
        content[begin : begin + after],
        len(content) - begin,
        **({"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}),
    )


def stalled(after: int) -> Callable[[Any, bytes, int], None]:
    """Nothing comes after so many bytes, and the connection stays open until the test has ended."""

    def answer(handler: Any, content: bytes, begin: int) -> None:
        broken_off(after)(handler, content, begin)
        handler.wfile.flush()
        handler.server.released.wait()

    return answer


def status(code: int) -> Callable[[Any, bytes, int], None]:
    """An answer without a file."""
    return lambda handler, content, begin: handler.answer(code)


def content_of(wrong: Callable[[bytes], bytes]) -> Callable[[Any, bytes, int], None]:
    """Another file than the listed one."""
    return lambda handler, content, begin: handler.send_from(wrong(content), begin)


def without_ranges(handler: Any, content: bytes, begin: int) -> None:
    """All of the file, whatever was asked for."""
    handler.answer(200, content)


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> Iterator[HubServer]:
    """A running Hub, and huggingface_hub allowed to reach it, which `make` keeps offline.

    Args:
        monkeypatch: Of the test.
        modules: ``blip_qformer.download.hub``, or the copy of it in the host's pack, whose Hub it is.
    """
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for module in modules:
        monkeypatch.setattr(module, "ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget_sessions()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
        forget_sessions()


def forget_sessions() -> None:
    """Let huggingface_hub make new sessions: one that was made offline stays offline."""
    utils = huggingface_hub.utils
    forget = getattr(utils, "reset_sessions", None) or getattr(utils, "close_session")  # noqa: B009 - since 1.0
    forget()
