"""The archive of `comfy node pack`, which is what git tracks without .comfyignore, and the version."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

import blip_qformer
from blip_qformer.version import read_version
from tools.demo import SMALL_MODEL, saved_images
from tools.host import PACK_NAME, ROOT, ComfyServer, make_base_directory
from tools.workflow import override, to_prompt


def git_files(*options: str) -> set[str]:
    command = ["git", "ls-files", "--cached", "-z", *options]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name}


@pytest.fixture(scope="module")
def archive():
    """Names of the files in the archive. comfy-cli reads .comfyignore by git's own rules for patterns."""
    return git_files() - git_files("--ignored", "--exclude-from=.comfyignore")


def test_archive_is_what_users_need(archive):
    files = {name for name in archive if "/" not in name}
    assert files == {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
    assert {name.partition("/")[0] for name in archive - files} == {
        "blip_qformer",
        "locales",
        "nodes",
        "web",
        "workflows",
    }


def test_archive_is_whole(archive):
    for folder in ("blip_qformer", "locales", "nodes", "web", "workflows"):
        assert git_files(folder) <= archive, folder


def test_archive_has_the_files_that_code_reads(archive):
    for name in ("blip_qformer/encoder/vocabulary.txt", "blip_qformer/training/runs/blip_diffusion/stage2.yaml"):
        assert name in archive


def test_unpacked_into_a_clean_host_the_first_workflow_runs(archive, tmp_path):
    """Nothing is set up but the model: the workflow, its sample image and the nodes are the archive's."""
    for name in archive:
        target = tmp_path / "custom_nodes" / PACK_NAME / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    base = make_base_directory(tmp_path)
    (base / "models" / "blip_diffusion" / "blipdiffusion").symlink_to(SMALL_MODEL)
    graph = json.loads((base / "custom_nodes" / PACK_NAME / "workflows" / "subject-generation.json").read_text("utf-8"))
    with ComfyServer(base) as server:
        prompt = to_prompt(graph, server.object_info())
        prompt = override(prompt, "EmptyLatentImage", width=256, height=256)
        (path,) = saved_images(server.queue(override(prompt, "KSampler", steps=2)), base)
    assert Image.open(path).size == (256, 256)


def test_version_stands_in_one_place():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert stated
    assert blip_qformer.__version__ == stated[1]
    assert f"## [{stated[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_version_of_an_installed_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr("blip_qformer.version.PYPROJECT", tmp_path / "pyproject.toml")
    assert read_version() == importlib.metadata.version("blip-diffusion")


def test_version_is_not_taken_from_a_neighbour(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "7"\n')
    monkeypatch.setattr("blip_qformer.version.PYPROJECT", tmp_path / "pyproject.toml")
    assert read_version() == importlib.metadata.version("blip-diffusion")
