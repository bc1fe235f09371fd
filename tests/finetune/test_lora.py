"""Low-rank factors against peft, and that they change nothing else."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from blip_qformer.finetune.lora import LoRA
from tests.finetune.tuning import caption, tuning_of


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


def test_a_network_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"no attention layers of SD1.5's names to adapt: choose full"):
        LoRA(nn.Sequential(nn.Linear(4, 4)))
