"""One small model with random weights in every layout that the commands read."""

import shutil
from pathlib import Path

import pytest
import torch

from blip_qformer.cli.command_line import main
from blip_qformer.cli.convert import QFORMER_NAME
from tests import oracle
from tests.random_weights import write_finetuned, write_hub_folder, write_lavis_folder
from tools.host import comfyui_path


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A small reference pipeline with random weights."""
    return oracle.pipeline(oracle.SMALL, tmp_path_factory.mktemp("tokenizer"), comfyui_path())


@pytest.fixture(scope="session")
def sources(pipeline, tmp_path_factory):
    """The same weights in the three published layouts, and a Q-Former alone."""
    folder = tmp_path_factory.mktemp("sources")
    subject = torch.randn(1, 16, oracle.SMALL.width)
    hub = write_hub_folder(pipeline, folder / "hub")
    assert main(["convert", str(hub), str(folder / "converted")]) == 0
    (folder / "converted" / QFORMER_NAME).rename(folder / "q-former.safetensors")
    return {
        "Hub folder": hub,
        "original (LAVIS) folder": write_lavis_folder(pipeline, folder / "lavis", subject),
        "fine-tuned file": write_finetuned(pipeline, folder / "checkpoint_40.pth", subject),
        "BLIP-2 Q-Former file": folder / "q-former.safetensors",
    }


@pytest.fixture(scope="session")
def with_controlnet(pipeline, tmp_path_factory):
    """The Hub folder that brings a ControlNet."""
    return write_hub_folder(
        pipeline, tmp_path_factory.mktemp("canny") / "hub", controlnet=oracle.controlnet(oracle.SMALL)
    )


@pytest.fixture
def hub(sources, tmp_path):
    """A Hub folder that a test may damage."""
    return Path(shutil.copytree(sources["Hub folder"], tmp_path / "hub"))
