"""A model with random weights, saved, and the reference with random weights, as it is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip_qformer.pipeline import Pipeline, save_pipeline
from tests import oracle, tiny
from tests.random_weights import write_hub_folder
from tools.host import comfyui_path

REFERENCE = oracle.Sizes(image_size=28, vision_width=64, vision_heads=1, width=32, text_heads=2, vae_channels=(32,) * 4)


@pytest.fixture(scope="session")
def model() -> Pipeline:
    """A model all of whose weights are random."""
    made = tiny.random_pipeline()
    made.vae.register_to_config(scaling_factor=0.9)
    return made


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory) -> Path:
    return save_pipeline(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> oracle.BlipDiffusionPipeline:
    """The reference with random weights."""
    return oracle.pipeline(REFERENCE, tmp_path_factory.mktemp("bert"), comfyui_path())


@pytest.fixture(scope="session")
def published(pipeline, tmp_path_factory) -> Path:
    """Its folder as it is published, tokenizer included."""
    folder = write_hub_folder(pipeline, tmp_path_factory.mktemp("published") / "model")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    return folder
