"""The image encoder, for a model that has none to start from; the published model takes CLIP's.

It learns three things at once: that two pictures of one subject in two places are the same (contrast of the class
tokens), to keep what it saw (every patch's pixels can be read off its token), and where (so can its row and column).
Nothing else here asks for the last, and what reads the tokens by attention cannot tell an outline without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blip_qformer.data.collate import Batch, vision_batch
from blip_qformer.data.pairs import Pair
from blip_qformer.pipeline.pipeline import image_size_of
from blip_qformer.training.config import RunConfig
from blip_qformer.training.losses import contrastive_loss, gather_rows, process_index
from blip_qformer.training.stages.base import Stage


class VisionStage(Stage):
    """Contrast of (subject, target) pictures, reconstruction of their patches, and where each patch is.

    Options:
        shared_width: of the space where pictures are compared.
        temperature: what the cosines are divided by.
        reconstruction_weight: of the patches' error.
        location_weight: of the cross entropy of their rows and columns.
    """

    name = "vision"
    uses = ("encoder",)
    trains = ("encoder.vision",)

    def _set(
        self,
        shared_width: int = 128,
        temperature: float = 0.1,
        reconstruction_weight: float = 1.0,
        location_weight: float = 0.1,
    ) -> None:
        sizes = self.pipeline.encoder.config.vision
        self.patch_size, self.patches = sizes.patch_size, sizes.image_size // sizes.patch_size
        self.temperature = temperature
        self.reconstruction_weight, self.location_weight = reconstruction_weight, location_weight
        self.identity_head = nn.Linear(sizes.width, shared_width)
        self.pixel_head = nn.Linear(sizes.width, 3 * sizes.patch_size**2)
        self.location_head = nn.Linear(sizes.width, 2 * self.patches)

    @classmethod
    def collate(cls, config: RunConfig) -> Callable[[Sequence[Pair]], Batch]:
        return partial(vision_batch, size=image_size_of(config))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        subjects, targets = batch["subjects"], batch["targets"]
        pixels = torch.cat([subjects, targets])  # [2 B, 3, S, S]
        tokens = self.pipeline.encoder.vision(pixels)  # [2 B, 1 + N, width]
        here, there = F.normalize(self.identity_head(tokens[:, 0]).float(), dim=-1).chunk(2)
        first = process_index() * len(subjects)
        with torch.autocast(pixels.device.type, enabled=False):  # as in query_text_similarity
            forwards, backwards = here @ gather_rows(there).T, there @ gather_rows(here).T
        identity = contrastive_loss(forwards, backwards, first, self.temperature)
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        reconstruction = F.mse_loss(self.pixel_head(tokens[:, 1:]).float(), patches)
        location = self._location_loss(tokens[:, 1:])
        own = torch.arange(first, first + len(subjects), device=pixels.device)
        return {
            "loss": identity + self.reconstruction_weight * reconstruction + self.location_weight * location,
            "identity": identity.detach(),
            "reconstruction": reconstruction.detach(),
            "location": location.detach(),
            "retrieval": (forwards.argmax(1) == own).float().mean(),
        }

    def _location_loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy of each patch's row and column, read off its token [B, N, width]."""
        read = rearrange(self.location_head(tokens).float(), "b n (two place) -> b n two place", two=2)
        row_and_column = torch.cartesian_prod(*[torch.arange(self.patches, device=tokens.device)] * 2)  # [N, 2]
        return F.cross_entropy(read.flatten(0, 2), row_and_column.repeat(len(tokens), 1).flatten())
