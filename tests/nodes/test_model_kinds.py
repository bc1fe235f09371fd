"""A U-Net that reads more than the noisy latent, as for inpainting: the host fills in the rest, and nodes work."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.test_prompt import compose

STEPS = 3


def draw(host, model, positive, negative, latent) -> torch.Tensor:
    """Sample as the stock KSampler does."""
    return host.ddim(model, positive, negative, latent, STEPS, 5.0, 3)["samples"]


@pytest.fixture
def prompts(host, loaded, subject) -> list[list]:
    """Two prompts of one subject, and a negative one."""
    texts = ("in the snow", "in the rain")
    conditionings = [compose(host, loaded, subject, prompt=text)[0] for text in texts]
    return [*conditionings, host.run("CLIPTextEncode", clip=loaded.clip, text="")[0]]


@pytest.fixture
def latent() -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(1, 4, 8, 8)}


def test_words_are_reweighted(host, inpainting_model, prompts, latent):
    prompt, _, negative = prompts
    plain = draw(host, inpainting_model, prompt, negative, latent)
    same, without = (
        draw(
            host,
            inpainting_model,
            host.run("BLIPDiffusionAttentionReweight", conditioning=prompt, weights=f"snow:{weight}")[0],
            negative,
            latent,
        )
        for weight in (1, 0)
    )
    torch.testing.assert_close(same, plain, atol=1e-3, rtol=0)
    assert not torch.allclose(without, plain, atol=1e-2)


def test_the_source_of_an_edit_is_drawn_as_it_is_alone(host, inpainting_model, prompts, latent):
    source, edited, negative = prompts
    conditioning, both, *_ = host.run("BLIPDiffusionPromptToPrompt", source=source, edited=edited, latent=latent)
    rows = draw(host, inpainting_model, conditioning, negative, both)
    assert len(rows) == 2
    torch.testing.assert_close(rows[:1], draw(host, inpainting_model, source, negative, latent), atol=1e-3, rtol=0)
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


def test_attention_is_recorded_and_the_image_stays(host, inpainting_model, prompts, latent):
    prompt, _, negative = prompts
    recorded, record, *_ = host.run("BLIPDiffusionAttentionRecord", conditioning=prompt)
    drawn = draw(host, inpainting_model, recorded, negative, latent)
    torch.testing.assert_close(drawn, draw(host, inpainting_model, prompt, negative, latent), atol=1e-3, rtol=0)
    image = torch.rand(1, 64, 64, 3)
    assert torch.isfinite(host.run("BLIPDiffusionAttentionMap", attention=record, image=image)[0]).all()
