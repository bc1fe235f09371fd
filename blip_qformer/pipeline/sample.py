"""Drawing with a model under training, from prompts to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion.ddim import ddim_sample
from .clip_text_model import encode_prompts
from .pipeline import Pipeline

#: What the paper's authors ask not to see; a model under training learns it as the prompt of nothing.
NEGATIVE_PROMPT = "over-exposure, under-exposure, saturated, duplicate, out of frame, lowres, cropped, worst quality"


def tokenize_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> list[list[int]]:
    """CLIP's ids of each prompt, without ``<bos>`` and ``<eos>``."""
    return pipeline.tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids


@torch.no_grad()
def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    subjects: Sequence[Tensor | None],
    *,
    noise: Tensor,
    negative: str = NEGATIVE_PROMPT,
    steps: int = 20,
    guidance: float = 7.5,
) -> Tensor:
    """Draw one picture for each prompt.

    Args:
        subjects: for each prompt its vectors [16, width], or None.
        noise: [B, 4, H / 8, W / 8], standard normal.

    Returns:
        [B, 3, H, W] in 0..1
    """
    device = next(pipeline.unet.parameters()).device
    texts = tokenize_prompts(pipeline, [*prompts, negative])
    context = encode_prompts(pipeline.text_encoder, texts, [*subjects, None])  # [B + 1, 77, width]
    latents = ddim_sample(
        lambda *inputs: pipeline.unet(*inputs).sample.float(),
        context[-1:].expand(len(prompts), -1, -1),
        context[:-1],
        noise.to(device),
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    # One by one: nothing else here needs as much memory as decoding.
    decoded = torch.cat(
        [pipeline.vae.decode(latent[None] / pipeline.vae.config.scaling_factor).sample for latent in latents]
    )
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
