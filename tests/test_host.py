"""The tooling that brings up ComfyUI, tried with stock nodes only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.host import Host
from tools.frontend import Frontend
from tools.host import PACK_NAME, ROOT, ComfyServer, Prompt, ServerError, WorkflowError, comfyui_path
from tools.host import make_base_directory as make_base


def _red_square(prefix: str, size: int = 64) -> Prompt:
    """A graph that makes and saves one image; ``prefix`` keeps the tests' cached results apart."""
    image = {"width": size, "height": size, "batch_size": 1, "color": 0xFF0000}
    return {
        "image": {"class_type": "EmptyImage", "inputs": image},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["image", 0], "filename_prefix": prefix}},
    }


def _load_and_show(name: str) -> Prompt:
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": name}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["load", 0]}},
    }


def test_a_prompt_writes_its_picture(server: ComfyServer) -> None:
    history = server.queue(_red_square("written"))
    assert history.executed == ["image", "save"]
    (file,) = history.files["save"]
    assert Image.open(file).getpixel((0, 0)) == (255, 0, 0)
    assert server.base in file.parents


def test_the_second_time_everything_is_cached(server: ComfyServer) -> None:
    server.queue(_red_square("cached"))
    again = server.queue(_red_square("cached"))
    assert again.executed == []
    assert sorted(again.cached) == ["image", "save"]
    assert again.files["save"][0].is_file()


def test_freeing_forgets_cached_results(server: ComfyServer) -> None:
    server.queue(_red_square("freed"))
    server.free()
    runs = (server.queue(_red_square("freed")) for _ in range(100))  # the server frees in a thread of its own
    assert any(history.executed for history in runs)


def test_texts_are_collected(server: ComfyServer) -> None:
    prompt = {"preview": {"class_type": "PreviewAny", "inputs": {"source": "a word"}}}
    assert server.queue(prompt).texts == {"preview": ["a word"]}


def test_events_are_passed_on(server: ComfyServer) -> None:
    events: list[tuple[str, object]] = []
    server.queue(_red_square("events"), on_event=lambda kind, data: events.append((kind, data.get("node"))))
    assert ("executing", "image") in events
    assert events[-1] == ("executing", None)


def test_a_failing_node_is_named(server: ComfyServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(WorkflowError, match=r"node load \(LoadImage\): .*UnidentifiedImageError: ") as failure:
        server.queue(_load_and_show(server.add_input(broken)))
    assert failure.value.node_id == "load"
    assert server.queue(_red_square("after a failure")).files["save"][0].is_file()


def test_a_refused_node_is_named_with_its_reason(server: ComfyServer) -> None:
    with pytest.raises(WorkflowError, match=r"LoadImage \(load\): .*Invalid image file: absent.png"):
        server.queue(_load_and_show("absent.png"))


def test_an_unknown_class_is_named(server: ComfyServer) -> None:
    with pytest.raises(WorkflowError, match="NoSuchNode"):
        server.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_run_can_be_interrupted(server: ComfyServer) -> None:
    prompt = _red_square("interrupted", size=512)
    for number in range(100):
        blur = {"image": [f"blur{number - 1}" if number else "image", 0], "blur_radius": 31, "sigma": 10.0}
        prompt[f"blur{number}"] = {"class_type": "ImageBlur", "inputs": blur}
    prompt["save"]["inputs"]["images"] = ["blur99", 0]

    def interrupt_at_once(kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data["node"] == "blur0":
            server.interrupt()

    with pytest.raises(WorkflowError, match=r"node blur\d+ \(ImageBlur\): Interrupted"):
        server.queue(prompt, on_event=interrupt_at_once)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-option"):
        ComfyServer(make_base(tmp_path), ("--no-such-option",)).__enter__()


def test_the_pack_is_a_folder_among_the_custom_nodes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    assert (base / "custom_nodes" / PACK_NAME).resolve() == ROOT
    assert make_base(base) == base, "a second time changes nothing"
    assert not (make_base(tmp_path / "stock", pack=None) / "custom_nodes" / PACK_NAME).exists()


def test_a_wrong_host_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ServerError, match=f"No ComfyUI is at '{tmp_path}'.*set COMFYUI_PATH"):
        comfyui_path()


def test_the_pack_loads_in_this_process_without_a_warning(host: Host) -> None:
    assert "WARNING" not in host.load_log
    assert "ERROR" not in host.load_log


def test_the_hosts_modules_win(host: Host) -> None:
    assert Path(sys.modules["nodes"].__file__ or "").parent == comfyui_path()
    assert host.module("nodes") is not sys.modules["nodes"]
    assert str(ROOT) not in sys.path


def test_a_stock_node_runs_in_this_process(host: Host) -> None:
    (image,) = host.run("EmptyImage", width=8, height=4, color=0x0000FF)
    assert image.shape == (1, 4, 8, 3)
    assert torch.equal(image[0, 0, 0], torch.tensor([0.0, 0.0, 1.0]))


def test_a_newer_style_node_runs_in_this_process(host: Host) -> None:
    (text,) = host.run("StringConcatenate", string_a="one", string_b="two", delimiter=" ")
    assert text == "one two"


def test_a_nodes_own_validation_is_asked(host: Host) -> None:
    with pytest.raises(ValueError, match="Invalid image file: absent.png"):
        host.run("LoadImage", image="absent.png")


def test_the_frontend_shows_itself(page: Frontend, tmp_path: Path) -> None:
    image = Image.open(page.screenshot(tmp_path / "frontend.png"))
    assert image.size == (1920, 1080)
    assert page.node_help("NoSuchNode") is None
