"""Every command the README shows is one that works: run here, or named as what needs the network."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image

from blip_qformer.pipeline import new_pipeline, save_pipeline
from blip_qformer.training.config import read_config
from tests import oracle, tiny
from tests.clipseg import write_clipseg
from tests.random_weights import write_hub_folder
from tools.host import ROOT, comfyui_path

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
MINI_RUNS = ROOT / "mini" / "runs"
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]

NEEDS_THE_NETWORK = {
    "comfy node install blip-diffusion",
    "hf download Salesforce/blipdiffusion --local-dir models/blip_diffusion/blipdiffusion",
    "pip install accelerate diffusers tensorboard webdataset pymatting",
}
RUN_BY_CI_AND_OTHER_TESTS = {"make test", "make demo"}  # .ci/run, tests/test_demo.py
TAKES_A_DAY = {"make mini"}  # what it runs, and with what, is tested here

QUICKLY = ["--steps", "2", "--resolution", "64", "--validate-every", "0"]  # what takes a minute on a graphics card

PUBLISHED = "../../models/blip_diffusion/blipdiffusion"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    return write_hub_folder(oracle.pipeline(oracle.SMALL, folder / "bert", comfyui_path()), folder / "hub")


@pytest.fixture(scope="module")
def paths(checkpoint, tmp_path_factory):
    """A small one of everything that the commands name, by its name there."""
    folder = tmp_path_factory.mktemp("paths")
    for name in ("photographs", "backgrounds"):
        (folder / name).mkdir()
        Image.new("RGB", (64, 64), "green").save(folder / name / "one.png")
    line = {"file": "one.png", "word": "lawn"}
    (folder / "photographs" / "metadata.jsonl").write_text(json.dumps(line))
    tiny.write_pairs(folder / "given")
    run = {
        "stage": "multimodal",
        "model": tiny.SIZES,
        "pairs": str(folder / "given"),
        "output": str(folder / "trained"),
    }
    run |= {"steps": 1, "batch_size": 4, "learning_rate": 1e-4, "num_workers": 0, "options": tiny.OPTIONS["multimodal"]}
    (folder / "run.yaml").write_text(json.dumps(run))  # all JSON is YAML
    for number in (1, 2, 3):
        Image.effect_noise((512, 512), 60).convert("RGB").save(folder / f"rex-{number}.jpg")
    names = (
        "photographs",
        "backgrounds",
        "pairs",
        "run.yaml",
        "converted",
        "tuned",
        "rex-1.jpg",
        "rex-2.jpg",
        "rex-3.jpg",
    )
    named = {name: folder / name for name in names}
    named["models/blip_diffusion/blipdiffusion"] = save_pipeline(new_pipeline(tiny.SIZES, seed=0), folder / "model")
    return {**named, PUBLISHED: checkpoint, "clipseg-rd64-refined": write_clipseg(folder / "clipseg")}


def test_every_command_is_accounted_for():
    ours = {command for command in COMMANDS if command.startswith("python -m blip_qformer")}
    assert ours
    assert set(COMMANDS) == ours | NEEDS_THE_NETWORK | RUN_BY_CI_AND_OTHER_TESTS | TAKES_A_DAY


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python -m blip_qformer")])
def test_commands_run_in_the_packs_folder(command, paths):
    words = [sys.executable, *(str(paths.get(word, word)) for word in shlex.split(command)[1:])]
    words += QUICKLY if "finetune" in words else []
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_mini_runs_every_run_and_evaluates_the_last():
    dry = subprocess.run(["make", "--dry-run", "mini"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"-m mini pretrain (mini/runs/\S+\.yaml)", dry)
    runs = [read_config(ROOT / name) for name in names]
    assert names == [str(file.relative_to(ROOT)) for file in sorted(MINI_RUNS.glob("[0-9]*.yaml"))]
    made = {ROOT / word for word in shlex.split(dry.replace(";", " ")) if "pairs-" in word}
    ((placed_from, placed_pairs, placed),) = re.findall(r"place-queries (\S+) (\S+) (\S+)", dry)
    models_made = {ROOT / each.output / "model" for each in runs}
    assert ROOT / placed_from in models_made
    assert ROOT / placed_pairs in made
    for run in runs:
        assert {ROOT / pairs.partition("/pairs-{")[0] for pairs in run.pairs} <= made
        models = [*run.networks.values(), *([run.model] if isinstance(run.model, str) else [])]
        assert {ROOT / model for model in models} <= models_made | {ROOT / placed}
    assert f"evaluate report {runs[-1].output / 'model'} " in dry


def test_python_example_runs(checkpoint, monkeypatch):
    (example,) = [block for language, block in BLOCKS if language == "python"]
    names = {"images": torch.rand(1, 60, 80, 3)}
    monkeypatch.setattr("blip_qformer.encoder.preprocess", preprocess_small)  # the small model's, not the published
    source = example.replace("models/blip_diffusion/blipdiffusion", str(checkpoint))
    exec(compile(source, "README.md", "exec"), names)  # noqa: S102 - the README's own text
    assert names["subject"].vectors.shape == (1, 16, oracle.SMALL.width)


def preprocess_small(images: torch.Tensor) -> torch.Tensor:
    from blip_qformer.encoder.preprocessing import preprocess

    return preprocess(images, size=oracle.SMALL.image_size)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)", README))))
def test_make_knows_the_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
