"""Fine-tuning one subject: the plain loop's numbers, what trains, what is kept; low-rank factors against peft."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from blip_qformer.diffusion.ddim import ddim_sample
from blip_qformer.finetune.loop import FinetuneCancelledError, FinetuneSettings, SubjectTuning, finetune, sample_batch
from blip_qformer.finetune.lora import LoRA
from blip_qformer.finetune.validation import Validation
from blip_qformer.pipeline import SCHEDULER_CONFIG
from tests import oracle, tiny

WIDTH, LATENT = 32, (4, 8, 8)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return oracle.randomized(UNet2DConditionModel(**tiny.SIZES["unet"]), 0)


@pytest.fixture
def latents() -> torch.Tensor:
    """Four pictures."""
    return torch.randn(4, *LATENT, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(2))


def caption(vectors: torch.Tensor) -> torch.Tensor:
    """A stand-in for a frozen text encoder: five words, the vectors, and what they do to each other."""
    words = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))
    return torch.cat([words, vectors]).softmax(dim=0)[None] + torch.cat([words, vectors.sin()])[None]


def tuning_of(unet, vectors, latents, lora=None, **settings) -> SubjectTuning:
    weights = lora.parameters if lora else list(unet.parameters())
    return SubjectTuning(
        lambda noisy, timesteps, context: unet(noisy, timesteps, context).sample,
        weights,
        vectors,
        latents,
        caption,
        FinetuneSettings(**{"learning_rate": 1e-3, **settings}),
        lora=lora is not None,
    )


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


def test_low_rank_steps_are_those_of_peft(unet, vectors, latents):
    reference = copy.deepcopy(unet).requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    reference.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=names))
    unet.requires_grad_(False)
    lora = LoRA(unet, rank=4, seed=5)
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        for name in lora.layers:
            theirs[f"{name}.lora_A.default.weight"].copy_(lora.down[name])
    factors = [weight for weight in theirs.values() if weight.requires_grad]
    there = tuning_of(reference, vectors, latents, steps=3, learning_rate=1e-4)
    there.optimizer.param_groups[0]["params"] = there.weights = factors
    there.optimizer.param_groups[0]["lr"] = 20 * 1e-4
    expected = [step.loss for step in there.steps()]
    with lora:
        tuning = tuning_of(unet, vectors, latents, lora, steps=3, learning_rate=1e-4)
        assert [step.loss for step in tuning.steps()] == pytest.approx(expected, abs=1e-6)
    assert len(factors) == 2 * len(lora.layers) == len(lora.parameters)
    for name in lora.layers:
        assert lora.up[name].abs().max() > 1e-3
        torch.testing.assert_close(lora.down[name], theirs[f"{name}.lora_A.default.weight"], atol=1e-6, rtol=0)
        torch.testing.assert_close(lora.up[name], theirs[f"{name}.lora_B.default.weight"], atol=1e-6, rtol=0)


def test_outside_their_with_low_rank_factors_change_nothing(unet, vectors, latents):
    unet.requires_grad_(False)
    inputs = latents, torch.tensor([500] * 4), caption(vectors).expand(4, -1, -1)
    before = unet(*inputs).sample
    lora = LoRA(unet, rank=2)
    with torch.no_grad():
        for factor in lora.up.values():
            factor.fill_(0.5)
    with lora:
        assert not torch.allclose(unet(*inputs).sample, before, atol=1e-3)
    assert torch.equal(unet(*inputs).sample, before)


def test_only_what_should_train_changes(unet, vectors, latents):
    unet.requires_grad_(False)
    before = copy.deepcopy(unet.state_dict())
    lora = LoRA(unet, rank=2)
    down = {name: factor.detach().clone() for name, factor in lora.down.items()}
    with lora:
        tuning = tuning_of(unet, vectors, latents, lora, steps=2)
        assert len(list(tuning.steps())) == 2
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    assert not torch.equal(tuning.vectors, vectors)
    assert not any(torch.equal(factor, down[name]) for name, factor in lora.down.items())


def test_the_loss_falls(vectors):
    """Of a network as it is before any training, on pictures of one colour, whose noise is easy to tell."""
    torch.manual_seed(0)
    untrained = UNet2DConditionModel(**tiny.SIZES["unet"])
    tuning = tuning_of(untrained, vectors, torch.ones(2, *LATENT), steps=100, learning_rate=1e-3)
    list(tuning.steps())
    assert sum(tuning.losses[-20:]) < 0.6 * sum(tuning.losses[:20])


def test_every_picture_comes_as_often_as_any_other(latents):
    settings = FinetuneSettings(steps=8, batch_size=3)
    seen = torch.cat([sample_batch(latents, settings, number).indices for number in range(1, 9)])
    assert seen.bincount().tolist() == [6, 6, 6, 6]
    for number in range(0, 24, 4):
        assert sorted(seen[number : number + 4].tolist()) == [0, 1, 2, 3]


def test_each_step_batch_anew_and_a_seed_repeats_it(latents):
    first, second = (sample_batch(latents, FinetuneSettings(seed=1), number) for number in (1, 2))
    again = sample_batch(latents, FinetuneSettings(seed=1), 1)
    other = sample_batch(latents, FinetuneSettings(seed=2), 1)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, other.noise)


def test_the_best_step_is_put_back(unet, vectors, latents):
    """Pictures get better until step 4, and worse again."""
    tuning = tuning_of(unet, vectors, latents, steps=6)
    quality = {0: 0.9, 2: 0.3, 4: 0.5, 6: 0.4}
    tuned_at = {}

    def sample_images(with_subject: bool) -> torch.Tensor:
        done = len(tuning.losses)
        tuned_at[done] = tuning.vectors.detach().clone()
        return torch.full((2, 3, 8, 8), quality[done] if with_subject else 0.0)

    def encode_images(images, words):  # the angle to what is looked for is the picture's brightness
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


@pytest.mark.parametrize("asked_at", [0, 2, 3])
def test_cancelled_while_a_look_is_drawn_it_ends_there(unet, vectors, latents, asked_at):
    """At the first look of all nothing has been trained yet; at the second one two steps have, at the third four."""
    tuning = tuning_of(unet, vectors, latents, steps=6)
    looks = []

    def sample_images(with_subject: bool) -> torch.Tensor:
        if len(looks) == asked_at:
            raise FinetuneCancelledError
        looks.append(len(tuning.losses))
        return torch.rand(1, 3, 8, 8)

    def make_validation(baseline: torch.Tensor) -> Validation:
        return Validation(lambda images, words: torch.ones(1, 16, 2), "dog", torch.ones(16, 2), ["here"], baseline)

    result = finetune(tuning, validate_every=2, sample=sample_images, make_validation=make_validation)
    assert result.kept_step == len(result.losses) == {0: 0, 2: 2, 3: 4}[asked_at]
    assert len(result.samples) == len(result.scores) == max(0, asked_at - 1)  # the first picture is without the subject
    untrained = tuning_of(unet, vectors, latents, steps=6)
    assert torch.equal(tuning.vectors, untrained.vectors) == (asked_at == 0)


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


def test_a_network_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"no attention layers of SD1.5's names to adapt: choose full"):
        LoRA(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}])
def test_settings_that_train_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="it must be more than 0"):
        FinetuneSettings(**changes)


@pytest.mark.parametrize("steps", [1, 10, 25])
def test_ddim_is_diffusers_own(steps):
    from diffusers import DDIMScheduler

    def denoise(noisy, timesteps, context):
        own = timesteps / 1000 + context.sum(dim=(1, 2))  # [B]
        return (noisy * 0.7 + own[:, None, None, None]).sin()

    noise = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    uncond, cond = torch.tensor([0.1, 0.3]), torch.tensor([0.2, -0.4])
    uncond, cond = uncond[:, None, None], cond[:, None, None]  # [2, 1, 1]
    scheduler = DDIMScheduler.from_config(SCHEDULER_CONFIG, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    latents = (1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt() * noise
    for timestep in scheduler.timesteps:
        plain, prompted = (denoise(latents, timestep.expand(2), context) for context in (uncond, cond))
        latents = scheduler.step(plain + 3 * (prompted - plain), timestep, latents).prev_sample
    drawn = ddim_sample(denoise, uncond, cond, noise, num_inference_steps=steps, guidance_scale=3)
    torch.testing.assert_close(drawn, latents, atol=1e-4, rtol=1e-4)
