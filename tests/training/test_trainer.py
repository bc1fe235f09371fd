"""The training loop: what it writes, how it goes on after it was killed, and what stops it."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blip_qformer.data.collate import Batch
from blip_qformer.pipeline import load_pipeline
from blip_qformer.training import trainer
from blip_qformer.training.checkpointing import find_latest, latest_checkpoint
from blip_qformer.training.config import RunConfig
from blip_qformer.training.stages import make_stage
from blip_qformer.training.stages.subject import SubjectStage
from blip_qformer.training.train_state import ema_weights, make_ema
from blip_qformer.training.trainer import NonFiniteError, pair_seeds, pair_stream, seeded_batches, train
from tests import tiny


@pytest.fixture(autouse=True)
def fresh_accelerate():
    tiny.reset_accelerate()
    yield
    tiny.reset_accelerate()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a saved model."""
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 4
    return {f"{file.parent.name}.{name}": weight for file in files for name, weight in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def scalars(log: Path, name: str) -> dict[int, float]:
    """What TensorBoard shows of a metric, by step."""
    events = EventAccumulator(str(log))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


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


def batches_from(config: RunConfig, accelerator: Accelerator, done: int) -> Iterator[Batch]:
    collate_fn = tiny.make_stage(config.stage).collate_fn
    return seeded_batches(config, accelerator, pair_stream(config, accelerator, done), collate_fn, done)


def test_batches_go_on_where_they_were(pairs):
    """The same pairs with the same seeds, each of its own; in another epoch, too."""
    done = 5
    config = tiny.make_config("vision", pairs=pairs, gradient_accumulation=2)
    accelerator = Accelerator(cpu=True)
    whole = list(itertools.islice(batches_from(config, accelerator, 0), 2 * done + 3))
    rest = list(itertools.islice(batches_from(config, accelerator, done), 3))
    for found, expected in zip(rest, whole[2 * done :], strict=True):
        assert found["keys"] == expected["keys"]
        assert found["seeds"] == expected["seeds"]
        assert torch.equal(found["targets"], expected["targets"])
    seeds = [seed for batch in whole for seed in batch["seeds"]]
    assert seeds == pair_seeds(0, range(len(seeds)))
    assert len(set(seeds)) == len(seeds)


def test_seeds_belong_to_positions_and_not_to_processes(pairs):
    """Two processes with half the batch have the seeds of one."""

    class Two:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, index: int):
            self.process_index = index

    config = tiny.make_config("vision", pairs=pairs, batch_size=2)
    shared = [next(itertools.islice(batches_from(config, Two(index), 3), 1, None)) for index in range(2)]
    whole = pair_seeds(0, range(4 * 4, 5 * 4))
    assert [seed for batch in shared for seed in batch["seeds"]] == whole
    assert len(set(pair_seeds(0, range(10_000)) + pair_seeds(1, range(10_000)))) == 20_000


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


def poisoned_loss(stage, loss):
    return loss * math.nan


def poisoned_gradient(stage, loss):
    """The same loss; but the square root's slope at 0 is infinite, and infinite times 0 is no number."""
    parameter = stage.trainable_parameters()[0]
    return loss + (parameter - parameter.detach()).sum().abs().sqrt()


@pytest.mark.parametrize(("poisoned", "what"), [(poisoned_loss, "loss"), (poisoned_gradient, "gradient")])
def test_what_is_no_number_stops_the_run(pairs, tmp_path, monkeypatch, poisoned, what):
    """With the step and all its pairs named, and before anything of it is kept."""
    original = SubjectStage.forward
    batches = []

    def forward(self, batch):
        batches.append(batch["keys"])
        losses = original(self, batch)
        return {**losses, "loss": poisoned(self, losses["loss"])} if len(batches) == 4 else losses

    monkeypatch.setattr(SubjectStage, "forward", forward)
    config = tiny.make_config(pairs=pairs, output=str(tmp_path), checkpoint_every=1, gradient_accumulation=2)
    with pytest.raises(NonFiniteError) as error:
        tiny.run(config)
    named = batches[3] if what == "loss" else batches[2] + batches[3]
    assert str(error.value).startswith(f"The {what} of step 2 is nan, for the pairs {', '.join(named)}: look at them")
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000001"
    assert not (tmp_path / "model").exists()


def test_the_log_has_the_metrics_and_the_samples(pairs, tmp_path):
    config = tiny.make_config(
        pairs=pairs, output=str(tmp_path), steps=4, log_every=2, validate_every=4, learning_rate=0.5e-3, batch_size=2
    )
    tiny.run(config)
    for name in ("loss", "learning_rate", "samples_per_second"):
        assert scalars(tmp_path / "log", name).keys() == {2, 4}
    assert scalars(tmp_path / "log", "learning_rate")[4] == pytest.approx(0.5e-3)
    assert all(value > 0 for value in scalars(tmp_path / "log", "samples_per_second").values())
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (4, 2 * 32, 3 * 32)
    assert (tmp_path / "samples.png").is_file()


def test_what_cannot_be_read_is_among_the_metrics(tmp_path):
    """A pair and a whole shard; where everything can be read there is no such metric."""
    folder = tiny.write_pairs(tmp_path / "pairs", shards=2)
    settings = {"pairs": str(folder), "log_every": 1, "validate_every": 0, "batch_size": 8}
    tiny.run(tiny.make_config(output=str(tmp_path / "whole"), steps=2, **settings))
    with pytest.raises(KeyError, match="unreadable"):
        scalars(tmp_path / "whole" / "log", "unreadable")

    (folder / "0.tar").write_bytes(b"no archive")
    tiny.run(tiny.make_config(output=str(tmp_path / "damaged"), steps=3, **settings))
    counts = [*scalars(tmp_path / "damaged" / "log", "unreadable").values()]
    assert counts[-1] == 3  # once in each epoch, of which one batch is left
    assert counts == sorted(counts)


def test_a_log_that_cannot_be_written_stops_nothing(pairs, tmp_path, monkeypatch, caplog):
    """On a full disk, what counts is the sentence about the checkpoint."""

    def full(*inputs, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    settings = {"pairs": pairs, "output": str(tmp_path), "log_every": 1, "validate_every": 2, "batch_size": 2}
    assert tiny.run(tiny.make_config(steps=2, **settings)).is_dir()
    (warning,) = [message for message in caplog.messages if "cannot be written" in message]
    reason = "[Errno 28] No space left on device"
    assert warning == f"The log in {tmp_path / 'log'} cannot be written ({reason}): the run goes on without it."


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


def test_what_was_logged_behind_the_last_checkpoint_is_logged_anew(pairs, tmp_path):
    settings = {"pairs": pairs, "output": str(tmp_path), "log_every": 1, "num_workers": 0}
    tiny.run(tiny.make_config("vision", steps=2, checkpoint_every=2, **settings))
    before = scalars(tmp_path / "log", "loss")
    (tmp_path / "checkpoints" / "step-00000002").rename(tmp_path / "checkpoints" / "step-00000001")
    (tmp_path / "checkpoints" / "step-00000001" / "run.json").write_text('{"step": 1}')
    tiny.run(tiny.make_config("vision", steps=3, checkpoint_every=0, **settings))
    after = scalars(tmp_path / "log", "loss")
    assert after.keys() == {1, 2, 3}
    assert after[1] == before[1]
    assert after[2] != before[2]


def learning_rates(config: RunConfig) -> list[float]:
    """The learning rate of every step, in a run that trains nothing."""
    tiny.run(config)
    return [*scalars(config.output / "log", "learning_rate").values()]


def test_the_learning_rate_follows_its_schedule(pairs, tmp_path):
    """What is logged at a step is the rate of the next one."""
    settings = {
        "pairs": pairs,
        "steps": 6,
        "learning_rate": 1e-3,
        "log_every": 1,
        "warmup_steps": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
    }
    constant = learning_rates(tiny.make_config("vision", output=str(tmp_path / "constant"), **settings))
    assert constant == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    cosine = learning_rates(tiny.make_config("vision", output=str(tmp_path / "cosine"), schedule="cosine", **settings))
    expected = [1e-3 * (0.5 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2) for step in range(1, 7)]
    assert cosine == pytest.approx(expected, abs=1e-9)


def test_a_run_goes_on_with_the_settings_that_its_file_has_now(pairs, tmp_path):
    """Whoever lowers the learning rate after a loss that is no number wants it lower."""
    settings = {"pairs": pairs, "output": str(tmp_path), "log_every": 1, "ema_decay": 0.9, "schedule": "cosine"}
    tiny.run(tiny.make_config("vision", steps=2, checkpoint_every=2, learning_rate=1e-3, **settings))
    changes = {"learning_rate": 1e-4, "weight_decay": 0.5, "betas": [0.8, 0.9], "epsilon": 1e-6, "ema_decay": 0.5}
    config = tiny.make_config("vision", steps=4, checkpoint_every=4, **{**settings, **changes})
    tiny.run(config)
    rates = scalars(tmp_path / "log", "learning_rate")
    assert rates[3] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 3 / 4)) / 2)
    last = tmp_path / "checkpoints" / "step-00000004"
    (group,) = torch.load(last / "optimizer.bin")["param_groups"]
    found = {"weight_decay": group["weight_decay"], "betas": [*group["betas"]], "epsilon": group["eps"]}
    found |= {"learning_rate": group["initial_lr"]}
    found |= {"ema_decay": torch.load(last / "custom_checkpoint_0.pkl")["ema"]["decay"]}
    assert found == changes


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


def test_the_moving_average_is_what_is_saved(pairs, tmp_path, monkeypatch):
    """Held against an average of the weights after every step, which forgets faster in the beginning."""
    after_step: list[torch.Tensor] = []
    original = trainer.RunLog.step
    stages = []
    monkeypatch.setattr(trainer, "make_stage", lambda *inputs: stages.append(make_stage(*inputs)) or stages[-1])
    weight = "position_embedding"

    def step(self):
        after_step.append(stages[-1].pipeline.encoder.vision.position_embedding.detach().clone())
        original(self)

    monkeypatch.setattr(trainer.RunLog, "step", step)
    settings = {"pairs": pairs, "steps": 6, "learning_rate": 1e-2}
    model = tiny.run(tiny.make_config("vision", output=str(tmp_path / "average"), ema_decay=0.3, **settings))
    average = after_step[0]
    for number, current in enumerate(after_step[1:], start=1):
        decay = min(0.3, 1 - (1 + number / 10) ** -0.75)
        average = decay * average + (1 - decay) * current
    found = load_pipeline(model).encoder.vision.state_dict()[weight]
    torch.testing.assert_close(found, average)
    assert (found - after_step[-1]).abs().max() > 1e-4

    after_step.clear()
    model = tiny.run(tiny.make_config("vision", output=str(tmp_path / "plain"), **settings))
    assert torch.equal(load_pipeline(model).encoder.vision.state_dict()[weight], after_step[-1])


def test_the_averaged_weights_give_the_others_back():
    stage = tiny.make_stage("vision")
    ema = make_ema(stage, 0.5)
    before = [parameter.clone() for parameter in stage.trainable_parameters()]
    with torch.no_grad():
        for parameter in stage.trainable_parameters():
            parameter.add_(1)

    def fail_inside() -> None:
        with ema_weights(stage, ema):
            assert not stage.training
            for found, expected in zip(stage.trainable_parameters(), before, strict=True):
                assert torch.equal(found, expected)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert stage.training
    for found, expected in zip(stage.trainable_parameters(), before, strict=True):
        assert torch.equal(found, expected + 1)


def test_half_precision_stays_near(pairs, tmp_path):
    losses = {}
    for precision in ("no", "bf16"):
        settings = {"pairs": pairs, "output": str(tmp_path / precision), "steps": 2, "log_every": 1}
        config = tiny.make_config(mixed_precision=precision, **settings)
        tiny.run(config)
        losses[precision] = scalars(config.output / "log", "loss")
    for step in (1, 2):
        assert losses["bf16"][step] == pytest.approx(losses["no"][step], rel=0.05)
    assert losses["bf16"][1] != losses["no"][1]


def test_recomputed_activations_change_nothing(pairs, tmp_path):
    models = []
    for checkpointing in (False, True):
        config = tiny.make_config(
            pairs=pairs, output=str(tmp_path / str(checkpointing)), steps=2, gradient_checkpointing=checkpointing
        )
        models.append(weights(tiny.run(config)))
    for name, expected in models[0].items():
        torch.testing.assert_close(models[1][name], expected, atol=1e-6, rtol=1e-4)


def test_accumulated_batches_count_as_one(pairs, tmp_path):
    """Two batches of two are one of four, but for the order of sums; Adam's division makes more of that."""
    found, expected = (
        weights(
            tiny.run(
                tiny.make_config(
                    pairs=pairs,
                    output=str(tmp_path / f"{size}"),
                    batch_size=size,
                    gradient_accumulation=4 // size,
                    steps=1,
                    epsilon=1e-3,
                )
            )
        )
        for size in (2, 4)
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)


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


def test_pairs_that_are_not_there_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no folder and no shard"):
        tiny.run(tiny.make_config("vision", pairs=str(tmp_path / "gone"), output=str(tmp_path)))
