"""The optimizer's settings, the learning rate's schedule and the moving average."""

from __future__ import annotations

import math

import pytest
import torch

from blip_qformer.pipeline import load_pipeline
from blip_qformer.training import trainer
from blip_qformer.training.config import RunConfig
from blip_qformer.training.stages import make_stage
from blip_qformer.training.train_state import ema_weights, make_ema
from tests import tiny
from tests.training.results import scalars


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
