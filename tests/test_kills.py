"""Whatever is written, the process is killed while it does: afterwards the old or the new is there, and whole.

Each writer makes one version after the other, in a process of its own that is killed at random moments. ``KILLS=100``
in the environment kills each one a hundred times; docs/reliability.md has the figures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from blip_qformer.atomic import atomic_file, atomic_folder, remove_partial
from blip_qformer.checkpoint.write_safetensors import write_safetensors
from blip_qformer.data.latent_cache import LatentCache
from blip_qformer.data.pairs import Pair
from blip_qformer.data.shards import write_shard
from blip_qformer.finetune.loop import FinetuneResult
from blip_qformer.pipeline.subject_finetune import FinetuneRun
from blip_qformer.subject import Subject, load_subject, save_subject
from blip_qformer.subject.preview import make_preview
from blip_qformer.subject.provenance import PROJECTION, QUERIES
from blip_qformer.training.checkpointing import find_latest, save_checkpoint
from mini.__main__ import _write as write_report
from tests import tiny

ENCODER = {name: torch.zeros(1, 4) for name in (QUERIES, PROJECTION)}  # what its hash is made of
KILLS = int(os.environ.get("KILLS", "5"))
LONGEST = 0.06  # seconds until a kill: several times what a write of these sizes needs


class Writer:
    """Something that is written, in versions that are told apart by their content."""

    def write(self, folder: Path, version: int) -> None:
        raise NotImplementedError

    def read(self, folder: Path) -> int:
        """The version that lies there; an error if it is not whole, or mixed of two."""
        raise NotImplementedError

    def recover(self, folder: Path) -> None:
        """What happens before the next write; for single files nothing has to."""


class SubjectWriter(Writer):
    def write(self, folder, version):
        save_subject(folder / "dog.safetensors", subject(version), overwrite=True)

    def read(self, folder):
        found = load_subject(folder / "dog.safetensors")
        version = the_one_value(found.vectors)
        assert found.preview == subject(version).preview
        return version


class FinetuneWriter(Writer):
    """A subject, its LoRA and two images."""

    def write(self, folder, version):
        values = torch.full((400, 400), float(version))
        run = SimpleNamespace(
            pipeline=SimpleNamespace(encoder=SimpleNamespace(state_dict=lambda: ENCODER)),
            tuning=SimpleNamespace(vectors=subject(version).vectors[0]),
            word="dog",
            image_hash="",
            preview=subject(version).preview,
            lora=True,
            snapshots=None,
            _state_dict=lambda: {"lora_unet.lora_up.weight": values},
        )
        losses, shade = [float(version)] * 3, version % 100 / 100
        result = FinetuneResult(kept_step=3, losses=losses, scores=[], samples=[torch.full((1, 3, 64, 64), shade)])
        FinetuneRun.save(run, folder, "dog", result)

    def read(self, folder):
        versions = {
            the_one_value(load_subject(folder / "dog.safetensors").vectors),
            the_one_value(load_file(folder / "dog-lora.safetensors")["lora_unet.lora_up.weight"]),
        }
        Image.open(folder / "dog-curve.png").load()
        previews = np.asarray(Image.open(folder / "dog-previews.png").convert("RGB"))
        (version,) = versions
        assert abs(previews.max() / 255 - version % 100 / 100) < 0.01
        return version

    def recover(self, folder):
        remove_partial(folder)


class CheckpointFileWriter(Writer):
    def write(self, folder, version):
        tensors = {str(number): torch.full((100, 1000), float(version)) for number in range(10)}
        write_safetensors(folder / "model.safetensors", tensors, overwrite=True)

    def read(self, folder):
        return the_one_value(torch.stack(list(load_file(folder / "model.safetensors").values())))


class TrainingCheckpointWriter(Writer):
    def __init__(self) -> None:
        tiny.reset_accelerate()
        self.accelerator = Accelerator(cpu=True)
        self.network = self.accelerator.prepare(torch.nn.Linear(300, 300))

    def write(self, folder, version):
        find_latest(folder, self.accelerator)  # as each run does when it is started
        with torch.no_grad():
            self.network.weight.fill_(float(version))
        save_checkpoint(self.accelerator, folder, version + 1, {})

    def read(self, folder):
        latest = find_latest(folder, self.accelerator)
        step = json.loads((latest / "run.json").read_text())["step"]
        assert latest.name == f"step-{step:08d}"
        assert the_one_value(load_file(latest / "model.safetensors")["weight"]) == step - 1
        return step - 1


class ShardWriter(Writer):
    def write(self, folder, version):
        image = Image.new("RGB", (64, 64))
        write_shard(folder / "pairs.tar", (Pair(f"{n:04d}", image, image, "dog", f"v{version}") for n in range(8)))

    def read(self, folder):
        with tarfile.open(folder / "pairs.tar") as archive:
            members = [member for member in archive if member.name.endswith(".json")]
            captions = [json.load(archive.extractfile(member))["caption"] for member in members]
        assert len(captions) == 8
        (caption,) = set(captions)
        return int(caption[1:])


class LatentCacheWriter(Writer):
    """Its files are never exchanged: the version is how many there are, whole ones."""

    def cache(self, folder: Path) -> LatentCache:
        def encode(image: torch.Tensor, return_dict: bool) -> list[Any]:
            latent = image.mean(dim=1, keepdim=True).expand(-1, 4, -1, -1)
            return [SimpleNamespace(mean=latent, std=latent)]

        return LatentCache(folder, SimpleNamespace(encoder=torch.nn.Linear(2, 2), encode=encode), 32)

    def write(self, folder, version):
        torch.manual_seed(0)
        mean, _ = self.cache(folder / "latents").encode(torch.full((1, 3, 200, 200), float(version)))
        assert the_one_value(mean) == 2 * version - 1

    def read(self, folder):
        files = list(folder.rglob("*.safetensors"))
        for file in files:
            the_one_value(load_file(file)["mean"])
        return len(files) - 1


class ReportWriter(Writer):
    def write(self, folder, version):
        report = SimpleNamespace(settings=tiny_settings(), table=lambda: f"version {version}")
        write_report(report, Image.new("RGB", (64, 64), (version % 100,) * 3), folder / "a.md", folder / "a.jpg")

    def read(self, folder):
        version = int((folder / "a.md").read_text().split()[1])
        assert abs(int(np.asarray(Image.open(folder / "a.jpg")).mean()) - version % 100) <= 1
        return version

    def recover(self, folder):
        remove_partial(folder)


class PngWriter(Writer):
    def write(self, folder, version):
        with atomic_file(folder / "samples.png") as temporary:
            colour = (version // 256**2, version // 256 % 256, version % 256)
            Image.new("RGB", (300, 300), colour).save(temporary, format="PNG")

    def read(self, folder):
        high, middle, low = np.asarray(Image.open(folder / "samples.png")).reshape(-1, 3).mean(axis=0).tolist()
        return int(high * 256**2 + middle * 256 + low)


class FolderWriter(Writer):
    def write(self, folder, version):
        with atomic_folder(folder / "model") as temporary:
            for name in ("one", "two", "three"):
                (temporary / name).write_text(f"{version}" + " " * 100_000)

    def read(self, folder):
        contents = [(folder / "model" / name).read_text() for name in ("one", "two", "three")]
        assert all(len(content) > 100_000 for content in contents)
        (version,) = set(map(int, contents))
        return version

    def recover(self, folder):
        remove_partial(folder)


WRITERS: dict[str, Callable[[], Writer]] = {
    "a subject": SubjectWriter,
    "a subject, its LoRA and images": FinetuneWriter,
    "a checkpoint's file": CheckpointFileWriter,
    "a training checkpoint": TrainingCheckpointWriter,
    "a shard": ShardWriter,
    "the latent cache": LatentCacheWriter,
    "a report": ReportWriter,
    "a PNG": PngWriter,
    "a model's folder": FolderWriter,
}


def tiny_settings() -> Any:
    from mini.evaluation.report import ReportSettings

    return ReportSettings()


def subject(version: int) -> Subject:
    preview = make_preview(torch.full((1, 3, 32, 32), version % 100 / 100))
    return Subject(torch.full((1, 16, 768), float(version)), "dog", preview=preview)


def the_one_value(tensor: torch.Tensor) -> int:
    (value,) = tensor.unique().tolist()
    return int(value)


def write_for_ever(writer: Writer, folder: Path, first: int, ready: Any) -> None:
    ready.send(True)
    for version in range(first, first + 10**6):
        writer.write(folder, version)


@pytest.fixture
def rng() -> Iterator[random.Random]:
    yield random.Random(0)
    tiny.reset_accelerate()


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_write_leaves_the_old_or_the_new(name, tmp_path, rng):
    """And no garbage after the next write."""
    writer = WRITERS[name]()
    writer.write(tmp_path, 0)
    version, interrupted = 0, 0
    for _ in range(KILLS):
        here, there = multiprocessing.Pipe()
        # A copy of this process, so that the first write begins at once.
        process = multiprocessing.get_context("fork").Process(
            target=write_for_ever, args=(writer, tmp_path, version + 1, there)
        )
        process.start()
        here.recv()
        time.sleep(rng.uniform(0, LONGEST))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += any(".partial" in path.name for path in tmp_path.rglob(".*"))
        writer.recover(tmp_path)
        found = writer.read(tmp_path)
        assert found >= version
        version = found + 1
        writer.write(tmp_path, version)
        assert writer.read(tmp_path) == version
        assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []
    print(f"{name}: {KILLS} kills, {interrupted} of them in a write")
