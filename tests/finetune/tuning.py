"""A fine-tuning whose text encoder is a formula."""

from __future__ import annotations

import torch

from blip_qformer.finetune.loop import FinetuneSettings, SubjectTuning

WIDTH, LATENT = 32, (4, 8, 8)


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
