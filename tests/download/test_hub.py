"""Files of the Hub: what comes whole, what goes on, and what is refused in a sentence."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from blip_qformer.download import hub
from blip_qformer.download.hub import DownloadError, fetch_file, list_files
from tests.download.hub_server import (
    COMMIT,
    broken_off,
    content_of,
    forget_sessions,
    hub_server,
    stalled,
    status,
    without_ranges,
)

REPOSITORY = "someone/thing"
NAME = "unet/weights.bin"
CONTENT = bytes(range(256)) * 400  # 102,400 bytes


@pytest.fixture
def server(monkeypatch):
    with hub_server(monkeypatch, hub) as server:
        server.repositories[REPOSITORY] = {NAME: CONTENT, "unet/config.json": b"{}"}
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # which huggingface_hub does before it asks again
        yield server


@pytest.fixture
def file(server):
    return next(file for file in list_files(REPOSITORY) if file.name == NAME)


class Counter:
    """Counts bytes, and cancels as a user does after so many."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self.count, self.cancel_after = 0, cancel_after

    def __call__(self, count: int) -> None:
        self.count += count
        if self.cancel_after is not None and self.count > self.cancel_after:
            raise KeyboardInterrupt


def fetched(file, folder) -> bytes:
    """Fetch a file that comes well in the end: counted to the byte, whole, and nothing beside it."""
    counter = Counter()
    path = fetch_file(file, folder, counter)
    assert counter.count == file.size
    assert os.listdir(path.parent) == ["weights.bin"]
    return path.read_bytes()


def refusal(file, folder) -> str:
    with pytest.raises(DownloadError) as error:
        fetch_file(file, folder, Counter())
    assert not (folder / NAME).exists()
    assert str(error.value).startswith(f"{NAME} of {REPOSITORY} ")
    return str(error.value)


def test_a_listing_has_commit_sizes_and_checksums(server):
    weights, config = list_files(REPOSITORY)
    assert (weights.commit, weights.name, weights.size) == (COMMIT, NAME, len(CONTENT))
    assert weights.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert (config.size, config.sha256) == (2, None)


def test_a_file_comes_whole_and_the_second_time_not_at_all(server, file, tmp_path):
    assert fetched(file, tmp_path) == CONTENT
    assert fetched(file, tmp_path) == CONTENT
    assert server.ranges == {NAME: [0, 0]}  # at the Hub and at its store


def test_the_users_token_is_sent(server, file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    list_files(REPOSITORY)
    fetch_file(file, tmp_path, Counter())
    assert server.tokens[0] is None
    assert server.tokens[1:3] == ["Bearer hf_abc"] * 2


def test_a_connection_that_breaks_off_goes_on_there(server, file, tmp_path, monkeypatch):
    server.faults[NAME] = [broken_off(40_000), broken_off(30_000)]
    assert fetched(file, tmp_path) == CONTENT
    assert server.ranges[NAME] == [0, 40_000, 70_000, 70_000]


def test_a_cancelled_download_goes_on_there(server, file, tmp_path):
    counter = Counter(cancel_after=50_000)
    with pytest.raises(KeyboardInterrupt):
        fetch_file(file, tmp_path, counter)
    assert os.listdir(tmp_path / "unet") == ["weights.bin.incomplete"]
    assert (tmp_path / "unet" / "weights.bin.incomplete").stat().st_size == counter.count == 51_000
    assert fetched(file, tmp_path) == CONTENT
    assert server.ranges[NAME][2:] == [51_000, 51_000]


def test_a_server_that_cannot_go_on_begins_anew(server, file, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.bin.incomplete").write_bytes(b"?" * 1000)
    server.faults[NAME] = [without_ranges]
    assert fetched(file, tmp_path) == CONTENT


def test_what_is_longer_than_the_file_is_not_gone_on_with(server, file, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.bin.incomplete").write_bytes(b"?" * (file.size + 1))
    assert fetched(file, tmp_path) == CONTENT


def test_another_content_is_refused_and_removed(server, file, tmp_path):
    server.faults[NAME] = [content_of(lambda content: content[:-1] + b"?")]
    found = hashlib.sha256(CONTENT[:-1] + b"?").hexdigest()
    assert (
        f"came with the SHA-256 {found}, and {file.sha256} is listed: it was changed or damaged on its way and is "
        "removed" in refusal(file, tmp_path)
    )
    assert os.listdir(tmp_path / "unet") == []
    assert fetched(file, tmp_path) == CONTENT


def test_a_longer_file_is_refused_and_removed(server, file, tmp_path):
    """However much comes: what a server without end sends is not written until the disk is full."""
    server.faults[NAME] = [content_of(lambda content: content * 50)]
    with pytest.raises(DownloadError, match=f"came with more than the {file.size} bytes that are listed"):
        fetch_file(file, tmp_path, sizes := Counter())
    assert sizes.count <= file.size
    assert os.listdir(tmp_path / "unet") == []


def test_a_shorter_file_is_refused(server, file, tmp_path):
    server.repositories[REPOSITORY][NAME] = CONTENT[:-1000]
    assert "the server answered 416: the file on the server has another size" in refusal(file, tmp_path)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (401, "hf auth login"),
        (403, "HF_TOKEN"),
        (404, "it is not there (any more)"),
        (429, "wait some minutes"),
        (500, "try again later"),
        (503, "try again later"),
    ],
)
def test_an_answer_of_the_server_is_a_sentence(server, file, tmp_path, code, remedy):
    server.faults[NAME] = [status(code)] * 99  # newer versions of huggingface_hub ask again
    sentence = refusal(file, tmp_path)
    assert f"was not downloaded, because the server answered {code}: " in sentence
    assert remedy in sentence


def test_a_server_that_stops_sending_is_a_sentence(server, file, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.faults[NAME] = [stalled(5_000), *[stalled(0)] * 99]
    assert "because the server stopped sending" in refusal(file, tmp_path)
    assert (tmp_path / "unet" / "weights.bin.incomplete").stat().st_size == 5_000
    server.faults[NAME] = []
    assert fetched(file, tmp_path) == CONTENT


def test_no_network_is_a_sentence(server, file, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "because the connection failed" in refusal(file, tmp_path)
        with pytest.raises(DownloadError, match=r"someone/thing at http://127.*the connection failed"):
            list_files(REPOSITORY)


def test_offline_is_a_sentence(server, file, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    assert "because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it" in refusal(file, tmp_path)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"):
        list_files(REPOSITORY)


def test_a_repository_that_is_not_there_is_a_sentence(server):
    with pytest.raises(DownloadError, match=r"someone/else at .* the server answered 404: it is not there"):
        list_files("someone/else")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_full_disk_is_a_sentence(server, file, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.bin.incomplete").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"weights.bin.incomplete could not be written .*: make room on that disk"):
        fetch_file(file, tmp_path, Counter())


def test_a_file_in_the_way_is_a_sentence(server, file, tmp_path):
    (tmp_path / "unet").write_bytes(b"")
    with pytest.raises(OSError, match=r"unet.* could not be written .*: a file is in the way"):
        fetch_file(file, tmp_path, Counter())


@pytest.mark.parametrize(
    "change",
    [
        {"rfilename": "unet/..\\..\\..\\custom_nodes\\evil.bin"},  # leads out of the folder on Windows
        {"rfilename": "unet/../../evil.bin"},
        {"rfilename": "/etc/evil.bin"},
        {"rfilename": "C:evil.bin"},
        {"rfilename": "unet/evil.bin\0"},
        {"rfilename": None},
        {"size": "big"},
        {"size": -1},
        {"size": float("inf")},
        {"lfs": {"size": 1}},
        {"lfs": {"size": 1, "sha256": "../x", "pointerSize": 1}},
    ],
)
def test_a_listing_that_makes_no_sense_is_refused_in_a_sentence(server, change):
    server.changes[NAME] = change
    with pytest.raises(DownloadError, match="something that is no listing of files") as error:
        list_files(REPOSITORY)
    assert str(error.value).startswith(f"{server.url} answered for {REPOSITORY} ")


def test_an_endpoint_that_is_no_address_is_named(server, monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", "huggingface.co")
    with pytest.raises(DownloadError, match="HF_ENDPOINT is 'huggingface.co', which is no address"):
        list_files(REPOSITORY)
