"""Through the host, our graph gives the reference pipeline's numbers on the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from blip_qformer.encoder import preprocess

STEPS, GUIDANCE = 10, 7.5  # 1000 is a multiple of the steps, so that both count time alike


@pytest.mark.parametrize("checkpoint", ["hub", "lavis", "checkpoint_40.pth"])
def test_subject_vectors(host, pipeline, checkpoints, checkpoint):
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint=checkpoint)
    image = torch.rand(2, 80, 60, 3)
    (subject,) = host.run(
        "BLIPDiffusionSubjectEncode", qformer=qformer, image=image, subject_word="teddy bear", average_batch=False
    )
    pixel_values = preprocess(image, size=pipeline.qformer.config.vision_config.image_size)
    expected = pipeline.get_query_embeddings(pixel_values, ["teddy bear"] * 2)
    torch.testing.assert_close(subject.vectors, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompt", "target", "strength", "repetitions"),
    [
        ("swimming underwater", "", 1.0, 20),
        ("swimming underwater", "teddy bear", 0.05, 20),
        ("", "", 1.0, 1),
        ("on a marble counter, café, 8k; extraordinarily photorealistic!", "", 0.5, 7),
        ("running " * 500, "", 1.0, 20),
    ],
)
def test_prompt_embeddings(host, loaded, pipeline, subject, prompt, target, strength, repetitions):
    conditioning, text = host.run(
        "BLIPDiffusionPromptCompose",
        clip=loaded.clip,
        subject=subject,
        prompt=prompt,
        target_subject=target,
        prompt_strength=strength,
        repetitions=repetitions,
    )
    composed = pipeline._build_prompt([prompt], [target or "dog"], strength, repetitions)
    assert [text] == composed
    expected = pipeline.encode_prompt(subject.vectors, composed)
    assert expected.std() > 0.1
    torch.testing.assert_close(conditioning[0][0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpoint", ["hub", "lavis", "checkpoint_40.pth"])
def test_whole_ddim_run(host, pipeline, checkpoints, subject, checkpoint):
    """U-Net, guidance and sampler against a DDIM loop over the reference's U-Net, from the same noise."""
    model, clip, vae, _ = host.run("BLIPDiffusionLoader", checkpoint=checkpoint)
    positive, text = host.run("BLIPDiffusionPromptCompose", clip=clip, subject=subject, prompt="in the snow")
    (negative,) = host.run("CLIPTextEncode", clip=clip, text="ugly")

    noise = torch.randn(1, 4, 16, 24, generator=torch.manual_seed(7))  # the host's own way to make it
    (latent,) = host.run(
        "KSampler",
        model=model,
        seed=7,
        steps=STEPS,
        cfg=GUIDANCE,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        positive=positive,
        negative=negative,
        latent_image={"samples": torch.zeros_like(noise)},
        denoise=1.0,
    )
    latents = reference_ddim(pipeline, noise, subject, text, "ugly")
    torch.testing.assert_close(latent["samples"] * 0.18215, latents, atol=1e-3, rtol=0)

    (image,) = host.run("VAEDecode", vae=vae, samples=latent)
    expected = pipeline.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-3, rtol=0)


def reference_ddim(pipeline, noise, subject, text, negative_text):
    """The reference pipeline's loop, with a scheduler that visits the same timesteps as the host's ddim_uniform."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,  # the host's last step ends at sigma 0
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    # The host starts an empty latent as sigma * noise; in diffusers' variables that is sqrt(1 - alpha) * noise.
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[0]]
    latents = (1 - alpha).sqrt() * noise
    tokens = pipeline.tokenizer([negative_text], padding="max_length", max_length=77, return_tensors="pt")
    context = torch.cat(
        [pipeline.text_encoder(input_ids=tokens.input_ids)[0], pipeline.encode_prompt(subject.vectors, [text])]
    )
    for timestep in scheduler.timesteps:
        without, with_prompt = pipeline.unet(latents.repeat(2, 1, 1, 1), timestep, context).sample.chunk(2)
        prediction = without + GUIDANCE * (with_prompt - without)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents
