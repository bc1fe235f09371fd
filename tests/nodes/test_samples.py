"""Sample pictures in the host's input folder: each comes once, over no file, and none comes back."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.host import Host
from tests.test_workflows import OTHER
from tools.host import ROOT, ComfyServer

SAMPLES = ROOT / "workflows" / "inputs"
NAMES = sorted(OTHER)


@pytest.fixture
def folders(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The host's input and user folders as on the first start: neither is there yet."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "input", tmp_path / "user"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(host: Host, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the pack logs about its samples when a host loads it."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "blip_diffusion"):
        host.module("nodes.host.samples").add_samples()
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]


def test_the_hosts_loader_has_brought_them(host: Host) -> None:
    """The host of the tests was given an empty base directory."""
    for name in NAMES:
        assert (host.base / "input" / name).read_bytes() == (SAMPLES / name).read_bytes()


def test_a_server_says_so_in_one_line_of_its_log(server: ComfyServer) -> None:
    (line,) = [line for line in server.log().splitlines() if "sample pictures" in line]
    assert f"{len(NAMES)} sample pictures for the workflows were added to {server.base / 'input'};" in line
    choices = server.object_info()["LoadImage"]["input"]["required"]["image"][0]
    assert set(choices) >= set(NAMES)


def test_the_first_start_brings_them_and_the_second_none(host, folders, caplog) -> None:
    inputs, _ = folders
    (line,) = start(host, caplog)
    assert line.startswith(f"INFO {len(NAMES)} sample pictures for the workflows were added to {inputs};")
    assert names_in(inputs) == NAMES  # nothing temporary, no README
    assert start(host, caplog) == []


def test_what_was_deleted_or_replaced_stays_so(host, folders, caplog) -> None:
    inputs, _ = folders
    start(host, caplog)
    deleted, replaced, *_ = NAMES
    (inputs / deleted).unlink()
    Image.new("RGB", (8, 8), "red").save(inputs / replaced)
    own = (inputs / replaced).read_bytes()
    assert start(host, caplog) == []
    assert not (inputs / deleted).exists()
    assert (inputs / replaced).read_bytes() == own


@pytest.mark.parametrize("broken_link", [False, True])
def test_no_file_of_that_name_is_written_over(host, folders, caplog, broken_link) -> None:
    inputs, _ = folders
    inputs.mkdir()
    own = inputs / NAMES[0]
    if broken_link:
        own.symlink_to(inputs / "gone.jpg")
    else:
        own.write_text("mine")
    (line,) = start(host, caplog)
    assert line.startswith(f"INFO {len(NAMES) - 1} sample pictures")
    assert own.is_symlink() if broken_link else own.read_text() == "mine"
    assert not (inputs / "gone.jpg").exists()
    own.unlink()
    assert start(host, caplog) == []  # it was there once: whoever deletes it does not get another in its place
    assert not own.exists()


def test_a_picture_that_a_later_version_adds_comes_alone(host, folders, tmp_path) -> None:
    inputs, user = folders
    copy_once = host.module("nodes.host.samples").copy_once
    older, newer = tmp_path / "older", tmp_path / "newer"
    shutil.copytree(SAMPLES, older)
    shutil.copytree(SAMPLES, newer)
    shutil.copy(SAMPLES / NAMES[0], newer / "blip-diffusion-new.jpg")
    assert copy_once(older, inputs, user / "samples.txt") == NAMES
    (inputs / NAMES[0]).unlink()
    assert copy_once(newer, inputs, user / "samples.txt") == ["blip-diffusion-new.jpg"]


@pytest.mark.parametrize("blocked", ["input", "user"])
def test_a_folder_that_cannot_be_written_is_one_warning(host, folders, caplog, blocked) -> None:
    """A file in the folder's place, for whoever runs the tests may write anywhere."""
    inputs, user = folders
    {"input": inputs, "user": user}[blocked].write_text("in the way")
    (line,) = start(host, caplog)
    assert re.fullmatch(
        rf"WARNING The sample pictures of the workflows could not be copied \(.*\): "
        rf"copy them from {SAMPLES} to {inputs} by hand\.",
        line,
    )
    assert not inputs.is_dir()


def test_the_rest_comes_when_a_copy_has_failed(host, folders, caplog) -> None:
    """Only what was copied is recorded."""
    inputs, user = folders
    inputs.write_text("in the way")
    start(host, caplog)
    inputs.unlink()
    (line,) = start(host, caplog)
    assert line.startswith(f"INFO {len(NAMES)} sample pictures")
    assert (user / "__blip_diffusion" / "samples.txt").read_text().split() == NAMES
