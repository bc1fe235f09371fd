"""The small model that ships: it is whole, small enough, and draws the thing it is shown in the place that is named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blip_qformer.checkpoint import open_checkpoint
from blip_qformer.encoder import preprocess
from blip_qformer.pipeline import load_pipeline
from blip_qformer.pipeline.sample import sample_images
from tools.host import ROOT

MINI = ROOT / "mini"
INPUTS = sorted((MINI / "inputs").glob("*.png"))
EDGE, STEPS, GUIDANCE = 256, 12, 4.0


@pytest.fixture(scope="module")
def pipeline():
    made = load_pipeline(MINI / "model")
    for network in made.networks.values():
        network.eval().requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    """Word -> picture [1, H, W, 3]; the files are called by what they show."""
    return {path.stem: torch.from_numpy(np.array(Image.open(path).convert("RGB")))[None] / 255 for path in INPUTS}


def pictures(pipeline, given: torch.Tensor, word: str, places: list[str]) -> torch.Tensor:
    """A thing in some places, all from the same noise, [P, 3, H, W]."""
    size = pipeline.encoder.config.vision.image_size
    vectors = pipeline.encoder(preprocess(given, size=size), [word])[0]
    noise = torch.randn(1, 4, EDGE // 8, EDGE // 8, generator=torch.Generator().manual_seed(3))
    prompts = [f"a {word} {place}" for place in places]
    inputs = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "negative_prompt": ""}
    noise = noise.expand(len(places), -1, -1, -1)
    return sample_images(pipeline, prompts, [vectors] * len(places), noise=noise, **inputs)


def middle(picture: torch.Tensor) -> torch.Tensor:
    """The mean colour of the middle of a picture [3, H, W]: of half its edge, which is more than a life ring's hole."""
    edge = picture.shape[-1]
    return picture[:, edge // 4 : edge * 3 // 4, edge // 4 : edge * 3 // 4].mean(dim=(1, 2))


def test_it_fits_into_the_repository():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    assert {"README.md"} <= {path.name for path in files}


def test_it_is_whole_and_in_the_hub_layout():
    checkpoint = open_checkpoint(MINI / "model")
    assert checkpoint.format == "Hub folder"
    assert not checkpoint.problems
    for name in ("unet", "vae", "text_encoder"):
        assert getattr(checkpoint, name) is not None


def test_it_is_not_in_the_registrys_archive():
    assert "mini/" in (ROOT / ".comfyignore").read_text().split()


def test_a_thing_keeps_its_colours_in_every_place(pipeline, given):
    """From the same noise, two things differ in the colour of their middle as their references do."""
    references = [middle(picture[0].permute(2, 0, 1)) for picture in given.values()]
    places = ["in the snow", "on the grass"]
    drawn = [list(map(middle, pictures(pipeline, picture, word, places))) for word, picture in given.items()]
    pairs = list(itertools.combinations(range(len(given)), 2))
    assert pairs
    for (one, other), place in itertools.product(pairs, range(len(places))):
        likeness = (drawn[one][place] - drawn[other][place]) @ (references[one] - references[other])
        assert likeness > 0.02, (list(given)[one], list(given)[other], places[place])


def test_a_place_is_the_one_that_was_named(pipeline, given):
    """Grass is green below, snow is white, the night is dark."""
    word, picture = next(iter(given.items()))
    grass, snow, night = pictures(pipeline, picture, word, ["on the grass", "in the snow", "at night"])
    red, green, blue = grass[:, -EDGE // 8 :].mean(dim=(1, 2))
    assert green > red + 0.1
    assert green > blue + 0.1
    assert snow[:, -EDGE // 8 :].mean() > 0.7
    assert night[:, : EDGE // 8].mean() < 0.3


def test_what_it_draws_is_a_picture_and_not_noise(pipeline, given):
    word, picture = next(iter(given.items()))
    (drawn,) = pictures(pipeline, picture, word, ["in the snow"])
    smooth = F.avg_pool2d(drawn[None], 5, stride=1, padding=2)[0]
    assert (drawn - smooth).abs().mean() < 0.05
    assert drawn.std() > 0.1
