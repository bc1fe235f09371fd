"""Every command the README shows is one that works: run here, or named as what needs the network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import torch

from tests import oracle
from tests.random_weights import write_hub_folder
from tools.host import ROOT, comfyui_path

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]

NEEDS_THE_NETWORK = {
    "comfy node install blip-diffusion",
    "hf download Salesforce/blipdiffusion --local-dir models/blip_diffusion/blipdiffusion",
}
RUN_BY_CI_AND_OTHER_TESTS = {"make test", "make demo"}  # .ci/run, tests/test_demo.py

PUBLISHED = "../../models/blip_diffusion/blipdiffusion"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    return write_hub_folder(oracle.pipeline(oracle.SMALL, folder / "bert", comfyui_path()), folder / "hub")


def test_every_command_is_accounted_for():
    ours = {command for command in COMMANDS if command.startswith("python -m blip_qformer")}
    assert ours
    assert set(COMMANDS) == ours | NEEDS_THE_NETWORK | RUN_BY_CI_AND_OTHER_TESTS


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python -m blip_qformer")])
def test_commands_run_in_the_packs_folder(command, checkpoint, tmp_path):
    words = [sys.executable, *shlex.split(command)[1:]]
    words = [str(checkpoint) if word == PUBLISHED else word for word in words]
    words = [str(tmp_path / word) if word == "converted" else word for word in words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_example_runs(checkpoint, monkeypatch):
    (example,) = [block for language, block in BLOCKS if language == "python"]
    names = {"images": torch.rand(1, 60, 80, 3)}
    monkeypatch.setattr("blip_qformer.encoder.preprocess", small_pictures)  # the small model's, not the published
    source = example.replace("models/blip_diffusion/blipdiffusion", str(checkpoint))
    exec(compile(source, "README.md", "exec"), names)  # noqa: S102 - the README's own text
    assert names["subject"].vectors.shape == (1, 16, oracle.SMALL.width)


def small_pictures(images: torch.Tensor) -> torch.Tensor:
    from blip_qformer.encoder.preprocessing import preprocess

    return preprocess(images, size=oracle.SMALL.image_size)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)", README))))
def test_make_knows_the_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
