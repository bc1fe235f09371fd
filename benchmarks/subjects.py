"""Many subjects at once: the speed of a trajectory in one run, and the memory of a large batch of images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.encoding import PROMPT
from benchmarks.measuring import compare
from benchmarks.memory import cost_in_own_process
from benchmarks.table import Row
from blip_qformer.checkpoint import save_qformer
from blip_qformer.encoder import SubjectEncoder
from tests.host import Host

PAIRS, TRAJECTORY, STEPS, EDGE = 3, 16, 4, 128
VIEWS = (8, 64)


def trajectory_rows(host: Host, loaded: SimpleNamespace) -> Iterator[Row]:
    """Compare sixteen subjects between two as one batch with sixteen graphs one after the other."""
    images = torch.rand(2, 1, 256, 256, 3)
    ends = [
        host.run("BLIPDiffusionSubjectEncode", qformer=loaded.qformer, image=image, subject_word="dog")[0]
        for image in images
    ]
    subjects = {"subject_1": ends[0], "subject_2": ends[1]}
    (empty,) = host.run("EmptyLatentImage", width=EDGE, height=EDGE, batch_size=1)
    (negative,) = host.run("CLIPTextEncode", clip=loaded.clip, text="ugly")

    def sample(subject, latent):
        positive, _ = host.run("BLIPDiffusionPromptCompose", clip=loaded.clip, subject=subject, prompt=PROMPT)
        return host.ddim(loaded.model, positive, negative, latent, STEPS, guidance=7.5, seed=0)

    def as_one_batch():
        (path,), (latent,), _ = host.run(
            "BLIPDiffusionSubjectTrajectory", **subjects, steps=TRAJECTORY, steps_at_once=TRAJECTORY, latent=empty
        )
        sample(path, latent)

    def one_by_one():
        for step in range(TRAJECTORY):
            blended, _ = host.run("BLIPDiffusionSubjectInterpolate", **subjects, x=step / (TRAJECTORY - 1))
            sample(blended, empty)

    yield Row(
        f"Subject Trajectory, {TRAJECTORY} pictures of {EDGE}x{EDGE}, {STEPS} steps",
        f"{TRAJECTORY} runs with Subject Interpolate",
        compare(as_one_batch, one_by_one, PAIRS),
        "below 1",
    )


def view_costs(encoder: SubjectEncoder) -> Iterator[tuple[str, ...]]:
    """Measure the memory of Subject Encode for batches of views of 512x512, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "qformer.safetensors"
        save_qformer(file, encoder.state_dict(), encoder.config, dtype=torch.float32)
        for views in VIEWS:
            cost = cost_in_own_process("encode views", file, str(views))
            image_bytes = views * 512 * 512 * 3 * 4
            yield (
                f"Subject Encode, {views} views",
                f"{cost.seconds / views:.2f}",
                f"{(cost.anonymous - image_bytes) / 1e9:.2f}",
                f"{image_bytes / 1e9:.2f}",
            )


VIEWS_HEAD = ("what", "s a view", "RssAnon peak beside the pictures, GB", "the pictures themselves, GB")
