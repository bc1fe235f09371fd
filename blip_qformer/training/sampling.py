"""Drawing with a model under training: DDIM with classifier-free guidance (arXiv 2010.02502, 2207.12598)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .parts import SCHEDULER, ModelParts
from .text_encoder import encode_prompts

#: What the paper's authors ask not to see; a model under training learns it as the prompt of nothing.
NEGATIVE_PROMPT = "over-exposure, under-exposure, saturated, duplicate, out of frame, lowres, cropped, worst quality"


def tokenize_prompts(parts: ModelParts, prompts: Sequence[str]) -> list[list[int]]:
    """CLIP's ids of each prompt, without ``<bos>`` and ``<eos>``."""
    return parts.tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids


@torch.no_grad()
def draw(
    parts: ModelParts,
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
        noise: [B, 4, H / 8, W / 8]. It is scaled as ComfyUI scales it for an empty latent, so that the same noise gives
            the same picture there.
    Returns:
        [B, 3, H, W] in 0..1
    """
    device = next(parts.unet.parameters()).device
    scheduler = DDIMScheduler.from_config(SCHEDULER, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    texts = tokenize_prompts(parts, [*prompts, negative])
    context = encode_prompts(parts.text_encoder, texts, [*subjects, None])  # [B + 1, 77, width]
    context = torch.cat([context[-1:].expand(len(prompts), -1, -1), context[:-1]])
    latents = (1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt() * noise.to(device)
    for timestep in scheduler.timesteps:
        both = parts.unet(latents.repeat(2, 1, 1, 1), timestep.to(device), context).sample
        without, with_prompt = both.chunk(2)
        latents = scheduler.step(without + guidance * (with_prompt - without), timestep, latents).prev_sample
    decoded = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)
