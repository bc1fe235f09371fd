"""Appearance before images: the Q-Former learns to tell what a subject looks like, for a model trained from nothing.

From the vectors of a subject on some background a small head reconstructs it alone, a few pixels large (pairs of
``prepare --alone``; the backgrounds of other targets are only noise here). A step costs a fraction of one of stage 2,
whose loss tells little about the vectors until the U-Net makes images. BLIP-2's Q-Former has seen 129 million images
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from blip_qformer.data.collate import Batch, subject_batch
from blip_qformer.pipeline import Pipeline
from blip_qformer.training.options import OptionGroup, PositiveCount, Probability
from blip_qformer.training.stages.base import CollateFn, Stage, image_grid, make_generators
from blip_qformer.training.stages.subject_vectors import qformer_output, replace_words

MAX_SAMPLES = 16


class AppearanceStage(Stage):
    """Error of the small target that is reconstructed from the subject vectors."""

    name = "appearance"
    uses = ("encoder",)
    trains = ("encoder.qformer", "encoder.projection")

    class Options(OptionGroup):
        """Options of the appearance stage.

        Args:
            edge: Edge of the small image, in pixels.
            head_width: Width of the head's one hidden layer.
            word_dropout: Probability that the word is replaced, see
                :func:`blip_qformer.training.stages.subject_vectors.replace_words`.
        """

        edge: PositiveCount = 32
        head_width: PositiveCount = 512
        word_dropout: Probability = 0.0

    options: Options

    def __init__(self, pipeline: Pipeline, options: Options, output: Path):
        super().__init__(pipeline, options, output)
        qformer = pipeline.encoder.config.qformer
        self.head = nn.Sequential(
            nn.Linear(qformer.query_tokens * qformer.width, options.head_width),
            nn.GELU(),
            nn.Linear(options.head_width, 3 * options.edge**2),
        )

    @property
    def collate_fn(self) -> CollateFn:
        """Subjects, their words, and small targets."""
        return partial(subject_batch, size=self.image_size, resolution=self.options.edge)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the mean squared error, and ``explained``, the share of the targets' variance."""
        targets = batch["targets"]  # [B, 3, edge, edge] in 0..1
        generators = make_generators(batch["seeds"])
        words, _ = replace_words(batch["words"], batch["captions"], self.options.word_dropout, generators)
        reconstructed = self._reconstruct(batch["pixel_values"], words)
        loss = F.mse_loss(reconstructed, targets)
        self._last_images = batch["subjects"], targets, reconstructed.detach()
        return {"loss": loss, "explained": 1 - loss.detach() / targets.var(dim=0).mean()}

    def samples(self) -> Image.Image:
        """Show subjects of the last batch, their targets, and what the head makes of their vectors."""
        subjects, targets, reconstructed = (each[:MAX_SAMPLES].float() for each in self._last_images)
        return image_grid([F.interpolate(each, subjects.shape[2:]) for each in (subjects, targets, reconstructed)])

    def _reconstruct(self, pixel_values: Tensor, words: Sequence[str]) -> Tensor:
        """[B, 3, S, S] and words -> [B, 3, edge, edge]."""
        encoder = self.pipeline.encoder
        vectors = encoder.projection(qformer_output(encoder, pixel_values, words))  # [B, Q, width]
        pixels = self.head(rearrange(vectors, "b q w -> b (q w)"))
        return rearrange(pixels, "b (c h w) -> b c h w", c=3, h=self.options.edge).float()
