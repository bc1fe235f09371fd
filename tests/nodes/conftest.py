"""A small random checkpoint in the host's models folder, and what the loader makes of it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests import oracle
from tests.host import Host
from tests.random_weights import write_finetuned, write_hub_folder, write_lavis_folder
from tools.host import comfyui_path

#: Heads of 64, as the layouts without a config are read.
SIZES = dataclasses.replace(oracle.SMALL, width=128, qformer_heads=2, text_heads=2)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> oracle.BlipDiffusionPipeline:
    """The reference, with the weights that the host loads."""
    return oracle.pipeline(SIZES, tmp_path_factory.mktemp("nodes"), comfyui_path())


@pytest.fixture(scope="session")
def controlnet() -> oracle.ControlNetModel:
    """A ControlNet that fits the pipeline."""
    return oracle.controlnet(SIZES)


@pytest.fixture(scope="session")
def checkpoints(host: Host, pipeline, controlnet) -> None:
    """The same weights in models/blip_diffusion as "hub" (with a ControlNet), "lavis" and "checkpoint_40.pth"."""
    folder = host.base / "models" / "blip_diffusion"
    write_hub_folder(pipeline, folder / "hub", controlnet=controlnet)
    write_lavis_folder(pipeline, folder / "lavis")
    write_finetuned(pipeline, folder / "checkpoint_40.pth", torch.randn(1, 16, SIZES.width))


@pytest.fixture(scope="session")
def loaded(host: Host, checkpoints) -> SimpleNamespace:
    """What Load BLIP-Diffusion gives for "hub"."""
    model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint="hub")
    return SimpleNamespace(model=model, clip=clip, vae=vae, qformer=qformer)


@pytest.fixture
def subject(host: Host, loaded):
    """A subject of one view, "dog"."""
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    return host.run("BLIPDiffusionSubjectEncode", qformer=loaded.qformer, image=image, subject_word="dog")[0]
