"""The image encoder, for a model that has none to start from; the published model takes CLIP's.

It learns two things at once: that two pictures of one subject in two places are the same (contrast of the class
tokens), and to keep what it saw (every patch's pixels can be read off its token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..batches import Batch, vision_batch
from ..config import RunConfig
from ..objectives import contrastive_loss, gather_rows, process_index
from ..parts import image_size_of
from ..shards import Pair
from .base import Stage


class VisionStage(Stage):
    """Contrast of (subject, target) pictures, and reconstruction of their patches.

    Options:
        shared_width: of the space where pictures are compared.
        temperature: what the cosines are divided by.
        reconstruction_weight: of the patches' error.
    """

    name = "vision"
    uses = ("encoder",)
    trains = ("encoder.vision",)

    def _set(self, shared_width: int = 128, temperature: float = 0.1, reconstruction_weight: float = 1.0) -> None:
        sizes = self.parts.encoder.config.vision
        self.patch_size = sizes.patch_size
        self.temperature, self.reconstruction_weight = temperature, reconstruction_weight
        self.identity_head = nn.Linear(sizes.width, shared_width)
        self.pixel_head = nn.Linear(sizes.width, 3 * sizes.patch_size**2)

    @classmethod
    def collate(cls, config: RunConfig) -> Callable[[Sequence[Pair]], Batch]:
        return partial(vision_batch, size=image_size_of(config))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        subjects, targets = batch["subjects"], batch["targets"]
        pixels = torch.cat([subjects, targets])  # [2 B, 3, S, S]
        tokens = self.parts.encoder.vision(pixels)  # [2 B, 1 + N, width]
        here, there = F.normalize(self.identity_head(tokens[:, 0]).float(), dim=-1).chunk(2)
        first = process_index() * len(subjects)
        with torch.autocast(pixels.device.type, enabled=False):  # as in query_text_similarity
            forwards, backwards = here @ gather_rows(there).T, there @ gather_rows(here).T
        identity = contrastive_loss(forwards, backwards, first, self.temperature)
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        reconstruction = F.mse_loss(self.pixel_head(tokens[:, 1:]).float(), patches)
        own = torch.arange(first, first + len(subjects), device=pixels.device)
        return {
            "loss": identity + self.reconstruction_weight * reconstruction,
            "identity": identity.detach(),
            "reconstruction": reconstruction.detach(),
            "retrieval": (forwards.argmax(1) == own).float().mean(),
        }
