"""The first ten minutes with the pack, in the page: from a fresh installation to an edited picture of a saved subject.

Pictures of the page at each step go to the folder that ``FIRST_MINUTES_SCREENSHOTS`` names; ``FIRST_MINUTES_LOCALE``
sets another language of the page, such as ``zh``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_workflows import WORKFLOWS
from tools.demo import SMALL_MODEL
from tools.frontend import RENDERERS, NoRendererError
from tools.host import ROOT, ComfyServer, comfyui_path, make_base_directory
from tools.host_versions import read_version
from tools.newcomer import Newcomer

STARTER, EDIT = "subject-generation", "edit-generated"
SMALL = {"width": 256, "height": 256, "steps": 4}
SUBJECT = "my_cat"

#: Nodes whose files this installation does not have: other models, and what ``convert`` makes of ours.
LOADERS_OF_FURTHER_MODELS = (
    "BLIPDiffusionControlNetLoader",
    "BLIPDiffusionQFormerLoader",
    "CheckpointLoaderSimple",
    "ControlNetLoader",
    "LoraLoaderModelOnly",
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """ComfyUI as it is after the pack was installed: no model, no picture of one's own."""
    with ComfyServer(make_base_directory(tmp_path_factory.mktemp("fresh"))) as running:
        yield running


@pytest.fixture(scope="module", params=RENDERERS)
def newcomer(fresh: ComfyServer, request: pytest.FixtureRequest) -> Iterator[Newcomer]:
    """The page on the first visit, with each of its renderers."""
    try:
        with Newcomer(fresh, request.param, os.environ.get("FIRST_MINUTES_LOCALE", "en")) as page:
            yield page
    except NoRendererError as error:
        pytest.skip(str(error))


@pytest.fixture
def models(fresh: ComfyServer) -> Iterator[Path]:
    """The folder that the published model is downloaded to; empty, and empty again afterwards."""
    folder = fresh.base / "models" / "blip_diffusion"
    yield folder
    for link in folder.iterdir():
        link.unlink()
    for saved in (fresh.base / "models" / "embeddings").iterdir():
        saved.unlink()


@pytest.fixture
def small_model(models: Path) -> Path:
    """The small model, under the name that the workflows ask for."""
    link = models / "blipdiffusion"
    link.symlink_to(SMALL_MODEL)
    return link


@pytest.fixture
def keep(newcomer: Newcomer, tmp_path: Path) -> Callable[[str], Path]:
    """Keep a picture of the page under a name."""
    folder = Path(os.environ.get("FIRST_MINUTES_SCREENSHOTS") or tmp_path)
    prefix = f"{read_version(comfyui_path())} {newcomer.renderer} {newcomer.settings['Comfy.Locale']}"
    return lambda step: newcomer.picture_as_it_is(folder / f"{prefix} {step}.png".replace(" ", "-"))


def nothing_is_wrong(page: Newcomer) -> None:
    """No message, no red ring, no error in the console, no image that something lies over."""
    assert page.messages() == ()
    assert page.ringed_nodes() == ()
    assert page.console_errors() == ()
    assert page.covered_images() == []


def small_values(page: Newcomer) -> dict[str, dict[str, int]]:
    """The size and the steps of the small model, for every node that has them, and a seed that no other page used."""
    values = {**SMALL, "seed": RENDERERS.index(page.renderer)}
    return {node: {name: values[name] for name in names if name in values} for node, names in page.widgets().items()}


def run(page: Newcomer) -> list[np.ndarray]:
    """Run the workflow on the canvas at the small model's size, and return the images that it saved.

    All outputs show their image, and nothing is wrong.
    """
    folder = page.server.base / "output"
    before = set(folder.rglob("*.png"))
    outputs = page.node_ids("SaveImage")
    finished = page.run_workflow(small_values(page), shows=outputs)
    assert (finished.end, finished.exception_message) == ("execution_success", "")
    assert finished.shown >= {*outputs, *page.node_ids("LoadImage")}
    nothing_is_wrong(page)
    new = sorted(set(folder.rglob("*.png")) - before)
    return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in new]


def test_without_a_model_run_says_how_to_get_it(newcomer, models, keep):
    newcomer.open_template(STARTER)
    nothing_is_wrong(newcomer)
    messages = newcomer.press_run()
    keep("1 without a model")
    assert any("Download the model first: add the node Download BLIP-Diffusion" in message for message in messages)
    newcomer.dismiss()


def test_from_the_template_browser_to_an_edited_picture_of_a_saved_subject(newcomer, fresh, small_model, keep):
    assert set(newcomer.template_names()) == set(WORKFLOWS)
    keep("2 templates")
    newcomer.open_template(STARTER)
    keep("3 starter opened")
    nothing_is_wrong(newcomer)
    assert newcomer.nodes_out_of_sight() == []
    newcomer.refresh_lists()
    (image,) = run(newcomer)
    keep("4 starter run")
    assert image.shape == (256, 256, 3)
    assert image.std() > 10  # an image of something

    (encode,) = newcomer.node_ids("BLIPDiffusionSubjectEncode")
    newcomer.add_node("BLIPDiffusionSubjectSave", {"name": SUBJECT}, inputs=[(encode, "subject", "subject")])
    run(newcomer)
    keep("5 subject saved")
    assert (fresh.base / "models" / "embeddings" / f"{SUBJECT}.safetensors").is_file()

    newcomer.open_template(EDIT)
    keep("6 edit opened")
    nothing_is_wrong(newcomer)
    assert newcomer.nodes_out_of_sight() == []
    newcomer.refresh_lists()
    composes = newcomer.node_ids("BLIPDiffusionPromptCompose")
    newcomer.add_node(
        "BLIPDiffusionSubjectLoad",
        {"subject_file": f"{SUBJECT}.safetensors"},
        outputs=[("subject", compose, "subject") for compose in composes],
    )
    source, edited = run(newcomer)
    keep("7 edit run")
    assert source.shape == edited.shape == (256, 256, 3)
    assert np.abs(source - edited).mean() > 2  # another picture, not the same with noise in it


@pytest.mark.parametrize("newcomer", RENDERERS[-1:], indirect=True)
def test_every_template_opens_with_its_pictures_and_nodes(newcomer, small_model, keep):
    """All that may be missing are the files of further models."""
    newcomer.open_template(STARTER)  # closes the template browser, which on the first visit opens by itself
    newcomer.refresh_lists()
    for workflow in WORKFLOWS:
        graph = json.loads((ROOT / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
        further = [node for node in graph["nodes"] if node["type"] in LOADERS_OF_FURTHER_MODELS]
        opened = newcomer.open_workflow(graph)
        assert (workflow, opened.missing_types, opened.console_errors) == (workflow, (), ())
        ringed = set(newcomer.ringed_nodes())
        messages = [*opened.messages, *newcomer.messages()]
        keep(f"8 {workflow}")
        assert (workflow, ringed - {str(node["id"]) for node in further}) == (workflow, set())
        assert further or not messages, (workflow, messages)
        for node in graph["nodes"]:
            if node["type"] == "LoadImage":
                assert str(node["id"]) in newcomer.shown_images()
        newcomer.dismiss()
