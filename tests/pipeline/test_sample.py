"""Drawing under training against the real host with the same model, and against the reference's loop."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.encoder import preprocess
from blip_qformer.pipeline import save_pipeline
from blip_qformer.pipeline.sample import NEGATIVE_PROMPT, sample_images
from tests import tiny

SEED, STEPS, SIZE = 3, 10, (64, 96)  # the image's height and width; 1000 is a multiple of the steps


@pytest.fixture(scope="module")
def pipeline():
    """A model all of whose weights are random, its latents of another scale than SD1.5's."""
    made = tiny.random_pipeline()
    made.vae.register_to_config(scaling_factor=0.7)
    return made


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8, generator=torch.manual_seed(SEED))


def test_the_host_samples_the_same_image_with_a_saved_model(host, pipeline, noise):
    """Load BLIP-Diffusion, BLIP-2 Subject Encode, Subject Prompt Compose, the stock KSampler and VAE Decode."""
    save_pipeline(pipeline, host.base / "models" / "blip_diffusion" / "trained")
    model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint="trained")
    image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(1))
    subject, _ = host.run("BLIPDiffusionSubjectEncode", qformer=qformer, image=image, subject_word="teddy bear")
    positive, text = host.run(
        "BLIPDiffusionPromptCompose", clip=clip, subject=subject, prompt="in the snow", prompt_strength=0.1
    )
    (negative,) = host.run("CLIPTextEncode", clip=clip, text=NEGATIVE_PROMPT)
    latent = host.ddim(model, positive, negative, {"samples": torch.zeros_like(noise)}, STEPS, 7.5, SEED)
    (expected,) = host.run("VAEDecode", vae=vae, samples=latent)

    with torch.no_grad():
        vectors = pipeline.encoder(preprocess(image, size=28), ["teddy bear"])
    torch.testing.assert_close(subject.vectors, vectors, atol=1e-4, rtol=0)
    found = sample_images(pipeline, [text], list(vectors), noise=noise, num_inference_steps=STEPS)
    assert found.shape == (1, 3, *SIZE)
    assert expected.std() > 0.05
    torch.testing.assert_close(found.permute(0, 2, 3, 1), expected, atol=1e-3, rtol=0)


def test_every_row_of_a_batch_is_an_image_of_its_own(pipeline, noise):
    prompts = ["a dog in the snow", "a cat", "a dog in the snow"]
    vectors = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"num_inference_steps": 2, "guidance_scale": 3.0}
    many = sample_images(pipeline, prompts, [vectors, None, None], noise=noise.expand(3, -1, -1, -1), **inputs)
    for row, subject in enumerate([vectors, None, None]):
        alone = sample_images(pipeline, prompts[row : row + 1], [subject], noise=noise, **inputs)
        torch.testing.assert_close(many[row], alone[0], atol=1e-4, rtol=0)
    assert (many[0] - many[2]).abs().max() > 0.01  # the subject has an effect


def test_without_guidance_the_negative_prompt_has_no_effect(pipeline, noise):
    one, other = (
        sample_images(
            pipeline, ["a dog"], [None], noise=noise, negative_prompt=text, num_inference_steps=2, guidance_scale=1.0
        )
        for text in ("ugly", "")
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
