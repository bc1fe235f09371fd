"""Fine-tuning one subject: the plain loop's numbers, what trains, what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from blip_qformer.finetune.loop import FinetuneCancelledError, FinetuneSettings, finetune, sample_batch
from blip_qformer.finetune.validation import Validation
from blip_qformer.pipeline import SCHEDULER_CONFIG
from tests import tiny
from tests.finetune.tuning import LATENT, caption, tuning_of


def test_full_steps_are_those_of_a_plain_torch_loop(unet, vectors, latents):
    plain, vectors_there = copy.deepcopy(unet), nn.Parameter(vectors.clone())
    settings = FinetuneSettings(steps=3, learning_rate=1e-3, seed=4)
    optimizer = torch.optim.AdamW(
        [*plain.parameters(), vectors_there], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    scheduler, losses = DDPMScheduler.from_config(SCHEDULER_CONFIG), []
    for number in (1, 2, 3):
        batch = sample_batch(latents, settings, number)
        noisy = scheduler.add_noise(latents[batch.indices], batch.noise, batch.timesteps)
        context = caption(vectors_there).expand(3, -1, -1)
        loss = F.mse_loss(plain(noisy, batch.timesteps, context).sample, batch.noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    tuning = tuning_of(unet, vectors, latents, steps=3, seed=4)
    assert [step.loss for step in tuning.steps()] == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(tuning.vectors, vectors_there, atol=1e-6, rtol=0)
    for (name, tuned), expected in zip(unet.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(tuned, expected, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_falls(vectors):
    """Of a network as it is before any training, on images of one colour, whose noise is easy to tell."""
    torch.manual_seed(0)
    untrained = UNet2DConditionModel(**tiny.SIZES["unet"])
    tuning = tuning_of(untrained, vectors, torch.ones(2, *LATENT), steps=100, learning_rate=1e-3)
    list(tuning.steps())
    assert sum(tuning.losses[-20:]) < 0.6 * sum(tuning.losses[:20])


def test_every_image_comes_as_often_as_any_other(latents):
    settings = FinetuneSettings(steps=8, batch_size=3)
    seen = torch.cat([sample_batch(latents, settings, number).indices for number in range(1, 9)])
    assert seen.bincount().tolist() == [6, 6, 6, 6]
    for number in range(0, 24, 4):
        assert sorted(seen[number : number + 4].tolist()) == [0, 1, 2, 3]


def test_each_step_samples_anew_and_a_seed_repeats_it(latents):
    first, second = (sample_batch(latents, FinetuneSettings(seed=1), number) for number in (1, 2))
    again = sample_batch(latents, FinetuneSettings(seed=1), 1)
    other = sample_batch(latents, FinetuneSettings(seed=2), 1)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, other.noise)


def test_the_best_step_is_put_back(unet, vectors, latents):
    """Images get better until step 4, and worse again."""
    tuning = tuning_of(unet, vectors, latents, steps=6)
    quality = {0: 0.9, 2: 0.3, 4: 0.5, 6: 0.4}
    tuned_at = {}

    def sample_images(with_subject: bool) -> torch.Tensor:
        done = len(tuning.losses)
        tuned_at[done] = tuning.vectors.detach().clone()
        return torch.full((2, 3, 8, 8), quality[done] if with_subject else 0.0)

    def encode_images(images, words):  # the angle to the subject is the image's brightness
        turned = images.mean(dim=(1, 2, 3))
        own = torch.stack([turned, 1 - turned], dim=1)
        ask = torch.tensor([[1.0, 0.0]]).expand(2, -1)
        return (own if words[0] == "dog" else ask)[:, None].expand(-1, 16, -1)

    wanted = torch.tensor([1.0, 0.0]).expand(16, -1)
    result = finetune(
        tuning,
        validate_every=2,
        sample=sample_images,
        make_validation=lambda baseline: Validation(encode_images, "dog", wanted, ["here", "there"], baseline),
    )
    assert result.kept_step == 4
    assert [score.step for score in result.scores] == [0, 2, 4, 6]
    assert [score.agreement for score in result.scores] == pytest.approx([1, 1, 1, 1])
    assert torch.equal(tuning.vectors, tuned_at[4])
    assert not torch.equal(tuning.vectors, tuned_at[6])


@pytest.mark.parametrize("cancelled_at", [0, 2, 3])
def test_cancelled_while_validation_samples_it_ends_there(unet, vectors, latents, cancelled_at):
    """At the first sampling of all nothing has been trained yet; at the third two steps have, at the fourth four."""
    tuning = tuning_of(unet, vectors, latents, steps=6)
    sampled_after = []

    def sample_images(with_subject: bool) -> torch.Tensor:
        if len(sampled_after) == cancelled_at:
            raise FinetuneCancelledError
        sampled_after.append(len(tuning.losses))
        return torch.rand(1, 3, 8, 8)

    def make_validation(baseline: torch.Tensor) -> Validation:
        return Validation(lambda images, words: torch.ones(1, 16, 2), "dog", torch.ones(16, 2), ["here"], baseline)

    result = finetune(tuning, validate_every=2, sample=sample_images, make_validation=make_validation)
    assert result.kept_step == len(result.losses) == {0: 0, 2: 2, 3: 4}[cancelled_at]
    # The first images are without the subject.
    assert len(result.samples) == len(result.scores) == max(0, cancelled_at - 1)
    untrained = tuning_of(unet, vectors, latents, steps=6)
    assert torch.equal(tuning.vectors, untrained.vectors) == (cancelled_at == 0)


def test_what_is_kept_on_the_way_is_never_the_untrained_weights(unet, vectors, latents, monkeypatch):
    """For a whole U-Net a snapshot is gigabytes."""
    tuning = tuning_of(unet, vectors, latents, steps=2)
    taken_at = []
    snapshot = tuning.snapshot
    monkeypatch.setattr(tuning, "snapshot", lambda: taken_at.append(len(tuning.losses)) or snapshot())

    def make_validation(baseline: torch.Tensor) -> Validation:
        return Validation(lambda images, words: torch.ones(1, 16, 2), "dog", torch.ones(16, 2), ["here"], baseline)

    finetune(
        tuning, validate_every=2, sample=lambda with_subject: torch.rand(1, 3, 8, 8), make_validation=make_validation
    )
    assert taken_at == [2]


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}])
def test_settings_that_train_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="it must be more than 0"):
        FinetuneSettings(**changes)
