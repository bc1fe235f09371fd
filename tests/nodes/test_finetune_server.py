"""Subject Fine-tune in a server: Cancel and SIGKILL as users have them, with nothing patched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.random_weights import write_hub_folder
from tools.host import ComfyServer, ServerError, WorkflowError, make_base_directory

TUNING, SAMPLER, LORA, SUBJECT, REPORT = "4", "8", "10", "11", "12"


@pytest.fixture
def base(pipeline, tmp_path) -> Path:
    """A base directory with the small model and a picture."""
    base = make_base_directory(tmp_path / "base")
    write_hub_folder(pipeline, base / "models" / "blip_diffusion" / "hub")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(base / "input" / "thing.png")
    return base


@pytest.fixture
def server(base) -> Iterator[ComfyServer]:
    """A server of the test's own."""
    with ComfyServer(base) as running:
        yield running


def graph(**changes: Any) -> dict[str, Any]:
    """Load, fine-tune, sample with the tuned model; and save picture, LoRA and subject."""
    settings = {
        "subject_word": "dog",
        "steps": 60,
        "trains": "low-rank",
        "learning_rate": 1e-4,
        "seed": 0,
        "batch_size": 2,
        "resolution": 64,
        "rank": 2,
        "look_every": 20,
        "look_prompts": "in the snow",
        "gradient_checkpointing": False,
        "mirror": False,
        **changes,
    }
    prompt = {"prompt": "in the snow", "target_subject": "", "prompt_strength": 1.0, "repetitions": 1}
    prompt |= {"overflow": "truncate", "subject_strength": 1.0}
    models = {name: ["1", index] for index, name in enumerate(("model", "clip", "vae", "qformer"))}
    nodes = {
        "1": ("BLIPDiffusionLoader", {"checkpoint": "hub"}),
        "2": ("LoadImage", {"image": "thing.png"}),
        TUNING: ("BLIPDiffusionSubjectFinetune", {**models, "image": ["2", 0], **settings}),
        "5": ("BLIPDiffusionPromptCompose", {"clip": ["1", 1], "subject": [TUNING, 1], **prompt}),
        "6": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        "7": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        SAMPLER: (
            "KSampler",
            {
                "model": [TUNING, 0],
                "seed": 1,
                "steps": 3,
                "cfg": 7.5,
                "sampler_name": "ddim",
                "scheduler": "ddim_uniform",
                "positive": ["5", 0],
                "negative": ["6", 0],
                "latent_image": ["7", 0],
                "denoise": 1.0,
            },
        ),
        "9": ("VAEDecode", {"samples": [SAMPLER, 0], "vae": ["1", 2]}),
        "13": ("SaveImage", {"images": ["9", 0], "filename_prefix": "picture"}),
        LORA: ("SaveLoRA", {"lora": [TUNING, 2], "prefix": "loras/tuned"}),
        SUBJECT: ("BLIPDiffusionSubjectSave", {"subject": [TUNING, 1], "name": "tuned", "overwrite": True}),
        REPORT: ("PreviewAny", {"source": [TUNING, 5]}),
    }
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


def at_step(number: int, act):
    """A listener that acts once, when the fine-tuning's progress comes to a step."""
    acted = []

    def listen(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == TUNING and data["value"] >= number and not acted:
            acted.append(data["value"])
            act()

    return listen


def queue_afresh(server: ComfyServer, prompt: dict[str, Any]) -> Any:
    """Queue a prompt whose results the host has forgotten."""
    server.free()
    history = server.queue(prompt)
    if TUNING in history.cached:  # it came before the host got to it, which it does after a prompt
        history = server.queue(prompt)
    assert TUNING in history.executed
    return history


def snapshots(base: Path) -> list[Path]:
    """The snapshots in a base directory."""
    return list((base / "user" / "__blip_diffusion").rglob("*.safetensors"))


def results(base: Path, history: Any) -> dict[str, Any]:
    """What a run saved: the newest LoRA, the subject, the picture, the report."""
    lora = max((base / "output" / "loras").glob("tuned*"), key=lambda path: path.stat().st_mtime_ns)
    subject = base / "models" / "embeddings" / "tuned.safetensors"
    picture = np.array(Image.open(history.files["13"][0]))
    tensors = {**load_file(lora), **load_file(subject), "picture": torch.from_numpy(picture)}
    return {**tensors, "report": history.texts[REPORT][0]}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    assert first["report"] == second["report"]
    for name in first.keys() - {"report"}:
        assert torch.equal(first[name], second[name]), name


def test_cancelled_it_keeps_what_it_learned_for_the_next_run(server, base):
    """By POST /interrupt in the middle. The graph stops behind the node, and the next run uses its result at once."""
    prompt = graph(look_every=0, steps=2000)
    with pytest.raises(WorkflowError, match="interrupted"):
        server.queue(prompt, on_event=at_step(10, server.interrupt))
    history = server.queue(prompt)
    assert TUNING in history.cached
    assert SAMPLER in history.executed
    cancelled = results(base, history)
    steps = int(cancelled["report"].split()[1])
    assert 10 <= steps < 2000
    assert cancelled["report"] == f"low-rank: {steps} steps, step {steps} kept."
    fresh = results(base, server.queue(graph(look_every=0, steps=steps)))
    assert_same(fresh, cancelled)


def test_a_cancelled_result_that_the_host_forgot_is_gone_on_with(server, base):
    """After Free Model and Node Cache the next run learns on from the step it was cancelled at."""
    with pytest.raises(WorkflowError, match="interrupted"):
        server.queue(graph(look_every=0), on_event=at_step(10, server.interrupt))
    (snapshot,) = snapshots(base)
    steps = len(load_file(snapshot)["losses"])
    history = queue_afresh(server, graph(look_every=0))
    assert f"Fine-tuning goes on from its snapshot: step {steps} of 60." in server.log()
    assert not snapshots(base)
    resumed = results(base, history)
    assert_same(results(base, queue_afresh(server, graph(look_every=0))), resumed)


def test_killed_in_the_middle_it_goes_on_to_the_same_result(base):
    """By SIGKILL of the process; a new server and the same graph. To the last bit, the picture included."""
    with ComfyServer(base) as server, pytest.raises(ServerError):
        server.queue(graph(), on_event=at_step(30, server.kill))
    (snapshot,) = snapshots(base)
    steps = len(load_file(snapshot)["losses"])
    assert 0 < steps < 60
    with ComfyServer(base) as server:
        resumed = results(base, server.queue(graph()))
        assert f"Fine-tuning goes on from its snapshot: step {steps} of 60." in server.log()
        assert not snapshots(base)
        assert_same(results(base, queue_afresh(server, graph())), resumed)


def test_another_picture_word_or_setting_begins_anew(server, base):
    with pytest.raises(WorkflowError, match="interrupted"):
        server.queue(graph(look_every=0), on_event=at_step(3, server.interrupt))
    pixels = np.random.default_rng(1).integers(0, 256, (80, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(base / "input" / "other.png")
    prompt = graph(look_every=0, steps=3)
    prompt["2"]["inputs"]["image"] = "other.png"
    for changed in (graph(look_every=0, steps=3), graph(look_every=0, steps=3, subject_word="cat"), prompt):
        report = server.queue(changed).texts[REPORT][0]
        assert report == "low-rank: 3 steps, step 3 kept."
    assert "goes on from its snapshot" not in server.log()
    assert len(snapshots(base)) == 1
