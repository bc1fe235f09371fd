"""Sample images from prompts and subject vectors with a whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion.ddim import ddim_sample
from .clip_text_model import encode_prompts
from .pipeline import Pipeline

#: The negative prompt of the paper's authors; during training it is the prompt of unconditional samples.
NEGATIVE_PROMPT = "over-exposure, under-exposure, saturated, duplicate, out of frame, lowres, cropped, worst quality"


def tokenize_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> list[list[int]]:
    """Tokenize prompts with CLIP's tokenizer, without ``<bos>`` and ``<eos>``.

    Args:
        pipeline: The model whose tokenizer is used.
        prompts: The prompts.

    Returns:
        The token ids of each prompt, of any length.
    """
    return pipeline.tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids


@torch.no_grad()
def sample_images(
    pipeline: Pipeline,
    prompts: Sequence[str],
    subjects: Sequence[Tensor | None],
    *,
    noise: Tensor,
    negative_prompt: str = NEGATIVE_PROMPT,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
) -> Tensor:
    """Sample one image for each prompt by DDIM.

    Args:
        pipeline: The model.
        prompts: The B prompts.
        subjects: Subject vectors of shape [16, width] for each prompt, or None for the prompt alone.
        noise: Standard normal noise of shape [B, 4, H / 8, W / 8].
        negative_prompt: The prompt that guidance leads away from.
        num_inference_steps: Number of sampling steps.
        guidance_scale: Weight of the prompt; 1 means no guidance.

    Returns:
        Images of shape [B, 3, H, W] in 0..1.
    """
    device = next(pipeline.unet.parameters()).device
    input_ids = tokenize_prompts(pipeline, [*prompts, negative_prompt])
    context = encode_prompts(pipeline.text_encoder, input_ids, [*subjects, None])  # [B + 1, 77, width]
    latents = ddim_sample(
        lambda *inputs: pipeline.unet(*inputs).sample.float(),
        context[-1:].expand(len(prompts), -1, -1),
        context[:-1],
        noise.to(device),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )  # [B, 4, h, w]
    latents = latents / pipeline.vae.config["scaling_factor"]
    # One by one: nothing else here needs as much memory as decoding.
    images = torch.cat(
        [pipeline.vae.decode(latent[None], return_dict=False)[0] for latent in latents]
    )  # [B, 3, H, W] in -1..1
    return (images.float() / 2 + 0.5).clamp(0, 1)
