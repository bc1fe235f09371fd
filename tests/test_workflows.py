"""Every workflow that ships: it runs in the real host, opens in the real frontend, and answers to its inputs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import requests
from PIL import Image

from blip_qformer.cli import main as blip_qformer
from tests import oracle
from tests.random_weights import DEMO, write_hub_folder
from tools.frontend import Frontend
from tools.host import PACK_NAME, ROOT, ComfyServer, WorkflowError, comfyui_path, make_base_directory
from tools.workflow import override, to_prompt

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))

#: The smallest model the stock CheckpointLoaderSimple takes for SD1.5: its CLIP and VAE, and one level of its U-Net.
STOCK = dataclasses.replace(
    DEMO,
    width=768,
    qformer_heads=12,
    text_layers=12,
    text_heads=12,
    unet_channels=(320,),
    unet_attention=(True,),
    vae_channels=(128, 256, 512, 512),
)


@pytest.fixture(scope="module")
def stocked(tmp_path_factory) -> Iterator[ComfyServer]:
    """A server with the sample photographs and a random model under every name the workflows ask for."""
    base = make_base_directory(tmp_path_factory.mktemp("workflows"))
    for photograph in (ROOT / "workflows" / "inputs").glob("*.jpg"):
        shutil.copy(photograph, base / "input")
    models, folder = base / "models", tmp_path_factory.mktemp("weights")
    write_hub_folder(
        oracle.pipeline(DEMO, folder / "demo", comfyui_path()), models / "blip_diffusion" / "blipdiffusion"
    )
    write_hub_folder(oracle.pipeline(STOCK, folder / "stock", comfyui_path()), folder / "hub")
    assert blip_qformer(["convert", str(folder / "hub"), str(folder / "converted")]) == 0
    shutil.move(folder / "converted" / "blip_diffusion_sd15.safetensors", models / "checkpoints")
    shutil.move(folder / "converted" / "blip2_qformer.safetensors", models / "blip_diffusion")
    with ComfyServer(base) as running:
        yield running


@pytest.fixture(scope="module")
def browser(stocked) -> Iterator[Frontend]:
    """That server's frontend."""
    with Frontend(stocked) as opened:
        yield opened


def small(server: ComfyServer, workflow: str) -> dict:
    """A workflow's prompt, made quick: three steps of 64 x 64 pixels."""
    graph = json.loads((ROOT / "workflows" / f"{workflow}.json").read_text())
    prompt = to_prompt(graph, server.object_info())
    prompt = override(prompt, "EmptyLatentImage", width=64, height=64)
    return override(prompt, "KSampler", steps=3)


def picture(server: ComfyServer, prompt: dict) -> np.ndarray:
    ((file,),) = server.queue(prompt).files.values()
    return np.array(Image.open(file))


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_runs_and_is_cached(stocked, workflow):
    prompt = small(stocked, workflow)
    first = stocked.queue(prompt)
    (pictures,) = first.files.values()
    assert [Image.open(file).size for file in pictures] == [(64, 64)]
    assert {*first.executed, *first.cached} == set(prompt)  # a node another workflow shares may be cached already
    assert len(first.executed) > len(first.cached)
    assert not stocked.queue(prompt).executed


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_answers_to_picture_word_and_prompt(stocked, workflow):
    prompt = small(stocked, workflow)
    original = picture(stocked, prompt)
    (shown,) = [node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage"]
    (other,) = {"cat.jpg", "cup.jpg"} - {shown}
    changes = [
        override(prompt, "LoadImage", image=other),
        override(prompt, "BLIPDiffusionSubjectEncode", subject_word="teapot"),
        override(prompt, "BLIPDiffusionPromptCompose", prompt="under the night sky"),
    ]
    for changed in changes:
        assert not np.array_equal(picture(stocked, changed), original)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_opens_in_the_frontend(stocked, browser, workflow):
    graph = json.loads((ROOT / "workflows" / f"{workflow}.json").read_text())
    opened = browser.open_workflow(graph)
    assert (opened.missing_types, opened.messages, opened.console_errors) == ((), (), ())
    assert opened.node_count == len(graph["nodes"])
    assert opened.prompt == to_prompt(graph, stocked.object_info())


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_is_offered_as_a_template_with_a_thumbnail(stocked, workflow):
    assert workflow in requests.get(f"{stocked.url}/api/workflow_templates").json()[PACK_NAME]
    thumbnail = requests.get(f"{stocked.url}/api/workflow_templates/{PACK_NAME}/{workflow}.jpg")
    assert thumbnail.headers["Content-Type"] == "image/jpeg"


def test_the_log_holds_no_complaint_about_the_pack(stocked):
    complaints = ("Traceback", "Cannot import", "IMPORT FAILED", "does not exist, ignoring", "shape mismatch")
    assert not [line for line in stocked.log().splitlines() if any(complaint in line for complaint in complaints)]


def test_a_missing_model_is_said_before_anything_runs(stocked):
    prompt = override(small(stocked, "subject-generation"), "BLIPDiffusionLoader", checkpoint="gone")
    with pytest.raises(WorkflowError, match=r'Load.*"gone" was not found in .*Salesforce/blipdiffusion'):
        stocked.queue(prompt)


def test_an_error_in_the_middle_leaves_nothing_behind(stocked):
    output = stocked.base / "output"
    before = sorted(output.rglob("*"))
    prompt = override(small(stocked, "subject-generation"), "BLIPDiffusionSubjectEncode", subject_word=" ")
    with pytest.raises(WorkflowError, match="The subject word is empty"):
        stocked.queue(prompt)
    assert sorted(output.rglob("*")) == before
    picture(stocked, small(stocked, "subject-generation"))  # and the next one runs
