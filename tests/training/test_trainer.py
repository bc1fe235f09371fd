"""The training loop: what it computes, and what stops it."""

from __future__ import annotations

import math

import pytest
import torch

from blip_qformer.training.checkpointing import latest_checkpoint
from blip_qformer.training.stages.subject import SubjectStage
from blip_qformer.training.trainer import NonFiniteError
from tests import tiny
from tests.training.results import scalars, weights


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


def test_pairs_that_are_not_there_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no folder and no shard"):
        tiny.run(tiny.make_config("vision", pairs=str(tmp_path / "gone"), output=str(tmp_path)))
