"""The image encoder, for a model that has none to start from; the published model takes CLIP's.

It learns three things at once: that two images of one subject on two backgrounds belong together (contrast of the class
tokens), to keep each patch's pixels (they are reconstructed from its token), and where it is (so are its row and
column). No other loss asks for the last, and what reads the tokens by attention cannot tell an outline without it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blip_qformer.data.collate import Batch
from blip_qformer.pipeline import Pipeline
from blip_qformer.training.distributed import gather_rows, process_index
from blip_qformer.training.losses import contrastive_loss
from blip_qformer.training.options import Number, OptionGroup, PositiveCount
from blip_qformer.training.stages.base import CollateFn, Stage

from .collate import vision_batch


class VisionStage(Stage):
    """Contrast of (subject, target) images, reconstruction of their patches, and each patch's location."""

    name = "vision"
    uses = ("encoder",)
    trains = ("encoder.vision",)

    class Options(OptionGroup):
        """Options of the vision stage.

        Args:
            shared_width: Width of the space where images are compared.
            temperature: Number that the cosines are divided by.
            reconstruction_weight: Weight of the patches' error.
            location_weight: Weight of the cross entropy of their rows and columns.
        """

        shared_width: PositiveCount = 128
        temperature: Number = 0.1
        reconstruction_weight: Number = 1.0
        location_weight: Number = 0.1

    options: Options

    def __init__(self, pipeline: Pipeline, options: Options, output: Path):
        super().__init__(pipeline, options, output)
        sizes = pipeline.encoder.config.vision
        self.patch_size, self.patches = sizes.patch_size, sizes.image_size // sizes.patch_size
        self.identity_head = nn.Linear(sizes.width, options.shared_width)
        self.pixel_head = nn.Linear(sizes.width, 3 * sizes.patch_size**2)
        self.location_head = nn.Linear(sizes.width, 2 * self.patches)

    @property
    def collate_fn(self) -> CollateFn:
        """Subjects and targets."""
        return partial(vision_batch, size=self.image_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted sum of the three losses, each of them, and how often a subject finds its own target."""
        subjects, targets = batch["subjects"], batch["targets"]
        pixels = torch.cat([subjects, targets])  # [2 B, 3, S, S]
        tokens = self.pipeline.encoder.vision(pixels)  # [2 B, 1 + N, width]
        subject, target = F.normalize(self.identity_head(tokens[:, 0]).float(), dim=-1).chunk(2)  # [B, D] each
        offset = process_index() * len(subjects)
        with torch.autocast(pixels.device.type, enabled=False):  # as in query_text_similarity
            forwards, backwards = subject @ gather_rows(target).T, target @ gather_rows(subject).T  # [B, G] each
        identity = contrastive_loss(forwards, backwards, offset, self.options.temperature)
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        reconstruction = F.mse_loss(self.pixel_head(tokens[:, 1:]).float(), patches)
        location = self._location_loss(tokens[:, 1:])
        own = torch.arange(offset, offset + len(subjects), device=pixels.device)
        weighted = self.options.reconstruction_weight * reconstruction, self.options.location_weight * location
        return {
            "loss": identity + weighted[0] + weighted[1],
            "identity": identity.detach(),
            "reconstruction": reconstruction.detach(),
            "location": location.detach(),
            "retrieval": (forwards.argmax(1) == own).float().mean(),
        }

    def _location_loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy of each patch's row and column, predicted from its token [B, N, width]."""
        logits = rearrange(self.location_head(tokens).float(), "b n (two index) -> b n two index", two=2)
        row_and_column = torch.cartesian_prod(*[torch.arange(self.patches, device=tokens.device)] * 2)  # [N, 2]
        return F.cross_entropy(logits.flatten(0, 2), row_and_column.repeat(len(tokens), 1).flatten())
