"""Checkpoints: how a run goes on after it was killed, and what is left after a full disk."""

from __future__ import annotations

import resource
import time
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator

from blip_qformer.pipeline import load_pipeline
from blip_qformer.training import trainer
from blip_qformer.training.checkpointing import find_latest, latest_checkpoint
from blip_qformer.training.trainer import train
from tests import tiny
from tests.training.results import assert_same, scalars, weights


@contextmanager
def seen_pairs(monkeypatch):
    """The keys of every batch that a loss was computed of."""
    seen: list[list[str]] = []
    original = trainer.check_finite

    def check_finite(value, step, keys, what="loss"):
        if what == "loss":
            seen.append(keys)
        original(value, step, keys, what)

    monkeypatch.setattr(trainer, "check_finite", check_finite)
    yield seen
    monkeypatch.undo()


#: Everything at once that a resumed run could get wrong.
HARD = {
    "gradient_accumulation": 2,
    "ema_decay": 0.9,
    "warmup_steps": 2,
    "num_workers": 1,
    "checkpoint_every": 1,
    "log_every": 1,
    "options": {
        "data": {"resolution": 32, "max_repetitions": 3, "cache_latents": True},
        "dropout": {"caption": 0.1, "projection": 0.2},
    },
}


def test_a_killed_run_goes_on_as_if_nothing_had_been(processes, pairs, tmp_path, monkeypatch):
    """Killed by SIGKILL after its first checkpoint, bit for bit and pair for pair."""
    assert torch.get_num_threads() == 1  # as in the other process: sums on several threads round otherwise
    config = tiny.make_config(pairs=pairs, output=str(tmp_path / "killed"), steps=1000, **HARD)
    process = processes.Process(target=train, args=(config,))  # the library's own, without the small model's weights
    process.start()
    checkpoints = config.output / "checkpoints"
    while latest_checkpoint(checkpoints) is None:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9
    done = int(latest_checkpoint(checkpoints).name.removeprefix("step-"))
    (checkpoints / ".step-00000999.partial").mkdir()  # what it may have been writing

    with seen_pairs(monkeypatch) as after:
        tiny.run(tiny.changed(config, steps=done + 3), initialise=None)
    whole = tiny.changed(config, output=tmp_path / "whole", steps=done + 3, checkpoint_every=0)
    with seen_pairs(monkeypatch) as expected:
        tiny.run(whole, initialise=None)
    assert after == expected[2 * done :]
    assert len(after) == 2 * 3
    assert_same(weights(config.output / "model"), weights(whole.output / "model"))
    names = [path.name for path in sorted(checkpoints.iterdir())]
    assert names == [f"step-{step:08d}" for step in (done + 2, done + 3)]

    logged, expected = (scalars(each.output / "log", "loss") for each in (config, whole))
    assert logged[done + 3] == expected[done + 3]


def test_a_run_that_is_done_is_only_saved_again(pairs, tmp_path):
    """As when it was killed between its last checkpoint and its end; the autoencoder measures itself there."""
    config = tiny.make_config("autoencoder", pairs=pairs, output=str(tmp_path), steps=2, checkpoint_every=1)
    model = tiny.run(config)
    first, scaling = weights(model), load_pipeline(model).vae.config.scaling_factor
    (model / "model_index.json").unlink()
    assert tiny.run(config) == model
    assert_same(weights(model), first)
    assert load_pipeline(model).vae.config.scaling_factor == scaling


def test_a_run_stopped_for_today_goes_on_as_if_it_had_not_been(pairs, tmp_path):
    """Its schedule is that of the whole run, before and after."""
    settings = {"pairs": pairs, "steps": 5, "log_every": 1, "schedule": "cosine", "learning_rate": 1e-3}
    stopped = tiny.make_config("vision", output=str(tmp_path / "stopped"), **settings)
    model = tiny.run(tiny.changed(stopped, checkpoint_every=100), stop_at=2)
    assert latest_checkpoint(stopped.output / "checkpoints").name == "step-00000002"
    assert load_pipeline(model)  # what was trained so far is saved
    tiny.run(stopped)
    whole = tiny.make_config("vision", output=str(tmp_path / "whole"), **settings)
    tiny.run(whole)
    assert scalars(stopped.output / "log", "learning_rate") == scalars(whole.output / "log", "learning_rate")
    assert_same(weights(stopped.output / "model"), weights(whole.output / "model"))
    with pytest.raises(ValueError, match="is to stop at step 0, but the first one is 1"):
        tiny.run(stopped, stop_at=0)


@contextmanager
def largest_file(size: int):
    """No file grows beyond this: what a full disk does, to one file at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100_000, 5_000_000], ids=["for nothing", "for the weights alone"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(pairs, tmp_path, room):
    """Whoever is writing when it happens: safetensors the weights, or torch AdamW's moments."""
    settings = {"pairs": pairs, "output": str(tmp_path), "log_every": 1, "checkpoint_every": 1, "batch_size": 2}
    tiny.run(tiny.make_config("multimodal", steps=1, **settings))
    checkpoints = tmp_path / "checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    sizes = {path.name: path.stat().st_size for path in before}
    assert sizes["model.safetensors"] < 5_000_000 < sizes["optimizer.bin"]
    sentence = (
        rf"^The checkpoint of step 2 could not be written to {checkpoints} \(.+\): make room there and start the run "
        "again, it goes on from step-00000001.$"
    )
    with largest_file(room), pytest.raises(OSError, match=sentence):
        tiny.run(tiny.make_config("multimodal", steps=2, **settings))
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before
    assert not list(checkpoints.glob(".*"))
    tiny.run(tiny.make_config("multimodal", steps=2, **settings))
    assert latest_checkpoint(checkpoints).name == "step-00000002"


def test_a_copy_of_a_checkpoint_is_let_be(pairs, tmp_path):
    config = tiny.make_config("vision", pairs=pairs, output=str(tmp_path), steps=3, checkpoint_every=1)
    kept = tmp_path / "checkpoints" / "step-00000001-kept"
    kept.mkdir(parents=True)
    tiny.run(config)
    names = {path.name for path in kept.parent.iterdir()}
    assert names == {"step-00000001-kept", "step-00000002", "step-00000003"}


def test_processes_that_see_other_checkpoints_get_one_sentence(tmp_path, monkeypatch):
    """As machines do that do not share the folder: one would go on, and the other begin anew."""
    (tmp_path / "step-00000007").mkdir()
    accelerator = Accelerator(cpu=True)
    assert find_latest(tmp_path, accelerator).name == "step-00000007"
    monkeypatch.setattr(accelerator, "gather", lambda here: torch.cat([here, torch.zeros_like(here)]))
    with pytest.raises(ValueError, match="is that of step 7 for some processes and of step 0 for others: choose an"):
        find_latest(tmp_path, accelerator)


def test_a_checkpoint_of_another_run_gets_one_sentence(pairs, tmp_path):
    settings = {"pairs": pairs, "output": str(tmp_path), "steps": 1, "checkpoint_every": 1}
    tiny.run(tiny.make_config("vision", **settings))
    with pytest.raises(ValueError, match="step-00000001 does not fit this run .*: choose another output to begin anew"):
        tiny.run(tiny.make_config("autoencoder", **settings))
    with pytest.raises(ValueError, match="does not fit this run .an ema_decay of 0 and another one do not go"):
        tiny.run(tiny.make_config("vision", ema_decay=0.5, **settings))
    state = tmp_path / "checkpoints" / "step-00000001" / "run.json"
    state.write_text('{"step": 1, "processes": 8}')
    with pytest.raises(ValueError, match="was written with processes 8 and cannot be taken up with 1, .* set it back"):
        tiny.run(tiny.make_config("vision", **settings))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 1}, {"num_workers": 2}, {"gradient_accumulation": 2}])
def test_a_run_does_not_go_on_with_pairs_in_another_order(pairs, tmp_path, changed):
    settings = {"pairs": pairs, "output": str(tmp_path), "steps": 1, "checkpoint_every": 1}
    tiny.run(tiny.make_config("vision", **settings))
    with pytest.raises(ValueError, match=f"was written with {next(iter(changed))} . and cannot be taken up with"):
        tiny.run(tiny.make_config("vision", **{**settings, "steps": 2, **changed}))


def test_a_step_that_cannot_be_read_gets_one_sentence(pairs, tmp_path):
    settings = {"pairs": pairs, "output": str(tmp_path), "steps": 1, "checkpoint_every": 1}
    tiny.run(tiny.make_config("vision", **settings))
    state = tmp_path / "checkpoints" / "step-00000001" / "run.json"
    for content in ("[", "[]", "{}", '{"step": "3"}', '{"step": -1}', '{"step": true}', "[" * 100_000):
        state.write_text(content)
        with pytest.raises(ValueError, match=r"run\.json (does not say which step|is not valid JSON)"):
            tiny.run(tiny.make_config("vision", **settings))
