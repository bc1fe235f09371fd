"""A fine-tuning that dies goes on from its snapshot to the same result, and damaged snapshots are refused."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blip_qformer.finetune import snapshots as module
from blip_qformer.finetune.loop import FinetuneCancelledError, finetune
from blip_qformer.finetune.lora import LoRA
from blip_qformer.finetune.snapshots import Snapshots, checksum
from blip_qformer.finetune.validation import Validation
from tests.finetune.tuning import tuning_of

STEPS, EVERY = 5, 2  # validated before any step, and after steps 2, 4 and 5


class DiedError(BaseException):
    """What ends the process, as far as the test can tell."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    """A snapshot after each step, however fast the steps are."""
    monkeypatch.setattr(module, "COST", float("inf"))
    monkeypatch.setattr(module, "SECONDS", 0)


def run(unet, vectors, latents, folder, *, low_rank=True, ends_at=None, error=DiedError, sampled=None):
    """Fine-tune; ends_at: the step after whose snapshot the error comes.

    Returns:
        Everything that the run made: parameters, optimizer, losses, scores and images.
    """
    network = copy.deepcopy(unet)
    lora = LoRA(network, rank=2, seed=1) if low_rank else None
    tuning = tuning_of(network, vectors, latents, lora, steps=STEPS)

    def sample(with_subject: bool) -> torch.Tensor:
        if sampled is not None:
            sampled.append(len(tuning.losses))
        noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(len(tuning.losses) * 2 + with_subject))
        return (noise + tuning.vectors.detach().mean()).clamp(0, 1)

    def encode_images(images, words):
        return images.mean(dim=1).flatten(1)[:, None].expand(-1, 16, -1)

    def make_validation(baseline):
        return Validation(encode_images, "dog", torch.ones(16, 64), ["here", "there"], baseline)

    def on_step(losses, samples):
        if ends_at is not None and len(losses) > ends_at:
            raise error

    def made():
        if lora is None:
            return result()
        with lora:
            return result()

    def result():
        return finetune(
            tuning,
            validate_every=EVERY,
            sample=sample,
            make_validation=make_validation,
            on_step=on_step,
            snapshots=snapshots,
        )

    snapshots = Snapshots(folder, "key")
    finished = made()
    if not finished.cancelled:
        snapshots.remove()
    return {
        **tuning.state_dict(),
        "scores": torch.tensor([[score.step, score.likeness, score.agreement] for score in finished.scores]),
        "samples": torch.stack(finished.samples),
        "kept": torch.tensor(finished.kept_step),
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("died_after", [1, 2, 3, 4])
def test_it_goes_on_to_the_same_result(unet, vectors, latents, tmp_path, caplog, low_rank, died_after):
    """To the last bit: weights, AdamW's moments, losses, scores, images and the step that is kept."""
    caplog.set_level("INFO")
    expected = run(unet, vectors, latents, tmp_path / "other", low_rank=low_rank)
    tmp_path = tmp_path / "folder"
    with pytest.raises(DiedError):
        run(unet, vectors, latents, tmp_path, low_rank=low_rank, ends_at=died_after)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["key.safetensors"]
    sampled = []
    assert_same(run(unet, vectors, latents, tmp_path, low_rank=low_rank, sampled=sampled), expected)
    assert f"goes on from its snapshot: step {died_after} of {STEPS}" in caplog.text
    assert sampled == [step for step in (2, 4, 5) if step > died_after]  # nothing is sampled twice, nor left out
    assert not tmp_path.exists()  # it is done


def test_cancelled_it_can_go_on_too(unet, vectors, latents, tmp_path):
    """The last step is saved, although it came between two snapshots."""
    expected = run(unet, vectors, latents, tmp_path / "other")
    cancelled = run(unet, vectors, latents, tmp_path, ends_at=2, error=FinetuneCancelledError)
    assert cancelled["kept"] == 3
    saved = Snapshots(tmp_path, "key").load()
    assert saved is not None
    assert len(saved["losses"]) == 3
    assert_same(run(unet, vectors, latents, tmp_path), expected)


def damaged(data: bytes) -> list[bytes]:
    """A file's bytes with one bit turned, at many places, and cut off at many."""
    places = [0, 7, 9, 60, len(data) // 3, len(data) // 2, len(data) - 1]
    turned = [data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :] for place in places]
    return [*turned, *(data[:place] for place in places), b"<html>", data + b"more"]


def test_a_damaged_snapshot_is_refused_and_it_begins_anew(unet, vectors, latents, tmp_path, caplog):
    expected = run(unet, vectors, latents, tmp_path / "other")
    tmp_path = tmp_path / "folder"
    with pytest.raises(DiedError):
        run(unet, vectors, latents, tmp_path, ends_at=3)
    path = tmp_path / "key.safetensors"
    data = path.read_bytes()
    for broken in damaged(data):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(broken)
        caplog.clear()
        assert Snapshots(tmp_path, "key").load() is None
        assert f"The snapshot {path} is damaged" in caplog.text
        assert not path.exists()
    path.parent.mkdir()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert_same(run(unet, vectors, latents, tmp_path), expected)


def test_another_key_is_another_fine_tuning(tmp_path):
    Snapshots(tmp_path, "one").save({"losses": torch.zeros(3)})
    assert Snapshots(tmp_path, "other").load() is None


def test_a_folder_that_cannot_be_written_stops_no_training(unet, vectors, latents, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    expected = run(unet, vectors, latents, tmp_path / "other")
    assert_same(run(unet, vectors, latents, tmp_path / "file"), expected)
    assert "No snapshot of the fine-tuning could be written" in caplog.text


def test_the_oldest_of_other_fine_tunings_make_room(tmp_path, monkeypatch):
    def saved(name: str, age: int) -> None:
        Snapshots(tmp_path, name).save({"losses": torch.zeros(1000)})
        os.utime(tmp_path / f"{name}.safetensors", (time.time() - age, time.time() - age))

    def kept() -> list[str]:
        return sorted(path.stem for path in tmp_path.glob("*.safetensors"))

    for age, name in ((9, "a"), (8, "b"), (7, "c"), (0, "d")):
        saved(name, age)
    assert kept() == ["b", "c", "d"]
    monkeypatch.setattr(module, "KEPT_BYTES", 12_000)  # two of 4 kB and their headers
    Snapshots(tmp_path, "d").save({"losses": torch.zeros(1000)})
    assert kept() == ["c", "d"]


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    """With a clock of our own: a run of a minute whose writing takes a second is saved two or three times."""
    monkeypatch.setattr(module, "COST", 0.05)
    monkeypatch.setattr(module, "SECONDS", 5)
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    written = []
    snapshots = Snapshots(tmp_path, "key")

    def write(*args, **kwargs):
        written.append(clock[0])
        clock[0] += 1

    monkeypatch.setattr(module, "write_safetensors", write)
    monkeypatch.setattr(module, "data_size", lambda _: 500e6)  # a second, as long as none was written
    while clock[0] < 60:
        clock[0] += 0.5
        snapshots.save_if_due(lambda: {"losses": torch.zeros(1)})
    assert written == [20, 41]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_a_checksum_sees_each_changed_value_and_blocks_exchanged(dtype):
    numbers = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    tensor = numbers > 0 if dtype == torch.bool else numbers.to(dtype)
    for index in (0, 4095, 4096, 14999):
        changed = tensor.clone()
        changed.view(-1)[index] = not changed.view(-1)[index] if dtype == torch.bool else changed.view(-1)[index] + 1
        assert checksum(changed) != checksum(tensor)
    assert checksum(tensor.clone()) == checksum(tensor)
    assert checksum(tensor[[1, 0, 2]]) != checksum(tensor)
    assert checksum(torch.zeros(())) == checksum(torch.zeros((), dtype=dtype)) == 0


WRITER = """
import sys, torch
from pathlib import Path
from blip_qformer.finetune.snapshots import Snapshots

snapshots = Snapshots(Path(sys.argv[1]), "key")
for number in range(1, 10**6):
    snapshots.save({"losses": torch.full((number % 7 + 1,), number), "weights": torch.full((300_000,), number)})
    print(number, flush=True)
"""


def test_killed_while_it_writes_a_whole_snapshot_is_there(tmp_path):
    """As old as the last that was written, or one newer; what was half written is gone with the next."""
    moments = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert process.stdout is not None
        last = [int(process.stdout.readline()) for _ in range(moments.randint(1, 9))][-1]
        time.sleep(moments.random() / 100)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        last = int(rest[-1]) if rest else last
        tensors = Snapshots(tmp_path, "key").load()
        assert tensors is not None
        number = int(tensors["weights"][0])
        assert number in (last, last + 1)
        assert torch.equal(tensors["weights"], torch.full((300_000,), number))
        assert torch.equal(tensors["losses"], torch.full((number % 7 + 1,), number))
    Snapshots(tmp_path, "key").save({"losses": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]
