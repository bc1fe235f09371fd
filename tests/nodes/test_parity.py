"""Through the host, our graph gives the reference pipeline's numbers on the same weights."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.encoder import preprocess
from tests import oracle

SEED, SIZE = 7, (128, 192)  # of the image, in pixels
STEPS, GUIDANCE = 10, 7.5  # 1000 is a multiple of the steps, so that both count time alike


@pytest.mark.parametrize("checkpoint", ["hub", "lavis", "checkpoint_40.pth"])
def test_subject_vectors(host, pipeline, checkpoints, checkpoint):
    (qformer,) = host.run("BLIPDiffusionQFormerLoader", checkpoint=checkpoint)
    image = torch.rand(2, 80, 60, 3)
    subject, _ = host.run(
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
    latent = sample(host, model, positive, negative)
    latents = reference_ddim(pipeline, subject, text, "ugly")
    torch.testing.assert_close(latent["samples"] * 0.18215, latents, atol=1e-3, rtol=0)

    (image,) = host.run("VAEDecode", vae=vae, samples=latent)
    expected = pipeline.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("steps", [1, STEPS])
def test_whole_ddim_run_with_a_controlnet(host, pipeline, controlnet, loaded, subject, steps):
    """The same with the folder's ControlNet, against a loop as diffusers' BlipDiffusionControlNetPipeline has it."""
    hint = torch.rand(1, *SIZE, 3, generator=torch.Generator().manual_seed(5))
    positive, text = host.run("BLIPDiffusionPromptCompose", clip=loaded.clip, subject=subject, prompt="in the snow")
    (negative,) = host.run("CLIPTextEncode", clip=loaded.clip, text="ugly")
    without_control = sample(host, loaded.model, positive, negative, steps)
    (control_net,) = host.run("BLIPDiffusionControlNetLoader", checkpoint="hub")
    positive, negative = host.run(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=control_net,
        image=hint,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    latent = sample(host, loaded.model, positive, negative, steps)
    expected = reference_ddim(pipeline, subject, text, "ugly", steps, controlnet, hint.permute(0, 3, 1, 2))
    torch.testing.assert_close(latent["samples"] * 0.18215, expected, atol=1e-3, rtol=0)
    assert (latent["samples"] - without_control["samples"]).abs().mean() > 0.1 * latent["samples"].std()


def sample(host, model, positive, negative, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """The host's DDIM run that ``reference_ddim`` repeats."""
    empty = {"samples": torch.zeros(1, 4, SIZE[0] // 8, SIZE[1] // 8)}
    return host.ddim(model, positive, negative, empty, steps, GUIDANCE, SEED)


def reference_ddim(pipeline, subject, text, negative_text, steps=STEPS, controlnet=None, hint=None) -> torch.Tensor:
    """The reference's run from the same noise, as the host makes it."""
    noise = torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8, generator=torch.manual_seed(SEED))
    prompt = pipeline.encode_prompt(subject.vectors, [text])
    return oracle.ddim(pipeline, noise, prompt, negative_text, steps, GUIDANCE, controlnet, hint)
