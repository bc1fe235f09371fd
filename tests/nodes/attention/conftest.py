"""A small model for the tests of edited attention."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests import oracle
from tests.nodes.conftest import SIZES
from tests.nodes.test_prompt import stock
from tests.random_weights import write_hub_folder
from tools.host import comfyui_path

#: Attention at the latents' size, at half and at a quarter of it, as SD1.5 has it.
LEVELS = dataclasses.replace(SIZES, unet_channels=(32, 32, 32), unet_attention=(True, True, True))


@pytest.fixture(scope="session")
def small(host, tmp_path_factory) -> SimpleNamespace:
    """A model of three levels, its CLIP and a subject."""
    pipeline = oracle.pipeline(LEVELS, tmp_path_factory.mktemp("editing"), comfyui_path())
    folder = host.base / "models" / "blip_diffusion" / "editing"
    write_hub_folder(pipeline, folder, controlnet=oracle.controlnet(LEVELS))
    model, clip, _, qformer = host.run("BLIPDiffusionLoader", checkpoint="editing")
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    subject, _ = host.run("BLIPDiffusionSubjectEncode", qformer=qformer, image=image, subject_word="dog")
    return SimpleNamespace(model=model, clip=clip, subject=subject, negative=stock(host, clip, "ugly"))
