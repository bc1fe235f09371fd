"""The small model that ships: whole, small enough, and it samples what it is shown in the context that is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

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
INPUTS = [MINI / "inputs" / f"{word}.png" for word in ("buoy", "lobster", "pear")]  # held-out things, each alone
EDGE, STEPS, GUIDANCE = 256, 12, 4.0


@pytest.fixture(scope="module")
def pipeline():
    made = load_pipeline(MINI / "model")
    for network in made.networks.values():
        network.eval().requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def references() -> dict[str, torch.Tensor]:
    """Word -> image [1, H, W, 3]; the files are called by what they show."""
    return {path.stem: torch.from_numpy(np.array(Image.open(path).convert("RGB")))[None] / 255 for path in INPUTS}


@pytest.fixture(scope="module")
def sample(pipeline, references) -> Callable[[str, str], torch.Tensor]:
    """(word, phrase) -> the thing in that context [3, H, W]; each once, all from the same noise."""
    size = pipeline.encoder.config.vision.image_size
    noise = torch.randn(1, 4, EDGE // 8, EDGE // 8, generator=torch.Generator().manual_seed(3))
    inputs = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "negative_prompt": ""}

    @cache
    def sample_once(word: str, phrase: str) -> torch.Tensor:
        vectors = pipeline.encoder(preprocess(references[word], size=size), [word])[0]
        return sample_images(pipeline, [f"a {word} {phrase}"], [vectors], noise=noise, **inputs)[0]

    return sample_once


def middle(image: torch.Tensor) -> torch.Tensor:
    """The mean colour of the middle of an image [3, H, W]: of half its edge, which is more than a life ring's hole."""
    edge = image.shape[-1]
    return image[:, edge // 4 : edge * 3 // 4, edge // 4 : edge * 3 // 4].mean(dim=(1, 2))


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
    assert "/mini/" in (ROOT / ".comfyignore").read_text().split()


def test_a_thing_keeps_its_colours_in_every_context(sample, references):
    """From the same noise, two things differ in the colour of their middle as their references do."""
    colours = {word: middle(image[0].permute(2, 0, 1)) for word, image in references.items()}
    pairs = list(itertools.combinations(references, 2))
    assert pairs
    for (one, other), phrase in itertools.product(pairs, ["in the snow", "on the grass"]):
        difference = middle(sample(one, phrase)) - middle(sample(other, phrase))
        assert difference @ (colours[one] - colours[other]) > 0.02, (one, other, phrase)


def test_the_context_is_the_one_that_was_named(sample, references):
    """Grass is green below, snow is white, the night is dark."""
    word = next(iter(references))
    grass, snow, night = (sample(word, phrase) for phrase in ("on the grass", "in the snow", "at night"))
    red, green, blue = grass[:, -EDGE // 8 :].mean(dim=(1, 2))
    assert green > red + 0.1
    assert green > blue + 0.1
    assert snow[:, -EDGE // 8 :].mean() > 0.7
    assert night[:, : EDGE // 8].mean() < 0.3


def test_a_sample_is_an_image_and_not_noise(sample, references):
    image = sample(next(iter(references)), "in the snow")
    smooth = F.avg_pool2d(image[None], 5, stride=1, padding=2)[0]
    assert (image - smooth).abs().mean() < 0.05
    assert image.std() > 0.1
