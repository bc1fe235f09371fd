"""The rooms' import rules catch what they forbid."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tools.host import ROOT

PACKAGES = ("blip_qformer", "nodes", "mini", "tools", "benchmarks")

#: A line that each rule forbids, in a file that the rule is about, by a phrase from the rule's name.
VIOLATIONS = {
    "nothing else of ComfyUI": ("nodes/encode.py", "import comfy.utils"),
    "nodes/host imports ComfyUI": ("nodes/host/latents.py", "import diffusers"),
    "does not import the nodes": ("nodes/host/latents.py", "from ..encode import NODES"),
    "upper half needs only": ("blip_qformer/encoder/model.py", "import accelerate"),
    "imaging adds": ("blip_qformer/imaging/matting.py", "import pymatting"),
    "download adds": ("blip_qformer/download/hub.py", "import requests"),
    "lower half may import": ("blip_qformer/training/trainer.py", "import comfy"),
    "in this order": ("blip_qformer/diffusion/ddim.py", "from ..pipeline import pipeline"),
    "knows no node": ("blip_qformer/data/pairs.py", "from ...nodes import encode"),
    "Nobody imports mini": ("blip_qformer/training/stages/base.py", "from mini.world import scenes"),
    "mini imports nothing": ("mini/world/scenes.py", "import nodes"),
}


@pytest.fixture
def repository(tmp_path):
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def broken_rules(repository):
    """The names of the rules that `python -m tools.imports` reports as broken."""
    command = [sys.executable, "-m", "tools.imports"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env={"COLUMNS": "200"})
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.endswith(" BROKEN")]
    assert (done.returncode != 0) == bool(broken)
    return broken


def test_the_repository_keeps_every_rule(repository):
    assert broken_rules(repository) == []


def test_every_rule_catches_a_violation(repository):
    for file, line in VIOLATIONS.values():
        with (repository / file).open("a") as opened:
            opened.write(f"\n{line}\n")
    broken = broken_rules(repository)
    assert (
        len(broken) == len(VIOLATIONS) == (ROOT / "pyproject.toml").read_text().count("[[tool.importlinter.contracts]]")
    )
    for phrase in VIOLATIONS:
        assert any(phrase in line for line in broken), phrase
