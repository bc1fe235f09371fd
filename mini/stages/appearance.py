"""Looks before pictures: the Q-Former learns to tell what a subject looks like, for a model that begins from nothing.

From the vectors of a subject somewhere a small head draws it alone, a few pixels large (pairs of ``prepare --alone``;
the backgrounds of other targets are only noise here). A step costs a fraction of one of stage 2, whose loss says little
about the vectors until the U-Net can draw. BLIP-2's Q-Former has seen 129 million pictures instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from blip_qformer.data.collate import Batch, subject_batch
from blip_qformer.data.pairs import Pair
from blip_qformer.pipeline.pipeline import image_size_of
from blip_qformer.training.config import RunConfig
from blip_qformer.training.stages.base import Stage, generators, side_by_side
from blip_qformer.training.stages.subject_vectors import ask, exchange_words

SHOWN = 16


class AppearanceStage(Stage):
    """The error of the target in small, drawn from the subject's vectors; ``explained`` is the part of its variance.

    Options:
        edge: of that small picture, in pixels.
        head_width: of the head's one hidden layer.
        word_dropout: how often the word gives way to another, see :func:`.questions.exchange_words`.
    """

    name = "appearance"
    uses = ("encoder",)
    trains = ("encoder.qformer", "encoder.projection")

    def _set(self, edge: int = 32, head_width: int = 512, word_dropout: float = 0.0) -> None:
        qformer = self.pipeline.encoder.config.qformer
        self.word_dropout = word_dropout
        self.edge = edge
        vectors_width = qformer.query_tokens * qformer.width
        self.head = nn.Sequential(nn.Linear(vectors_width, head_width), nn.GELU(), nn.Linear(head_width, 3 * edge**2))

    @classmethod
    def collate(cls, config: RunConfig) -> Callable[[Sequence[Pair]], Batch]:
        return partial(subject_batch, size=image_size_of(config), resolution=cls.options(config)["edge"])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        targets = batch["targets"]  # [B, 3, edge, edge] in 0..1
        words, _ = exchange_words(batch["words"], batch["captions"], self.word_dropout, generators(batch["seeds"]))
        drawn = self._draw(batch["pixel_values"], words)
        loss = F.mse_loss(drawn, targets)
        self._shown = batch["subjects"], targets, drawn.detach()
        return {"loss": loss, "explained": 1 - loss.detach() / targets.var(dim=0).mean()}

    def samples(self) -> Image.Image:
        """Subjects of the last batch, their targets, and what the head makes of their vectors."""
        subjects, targets, drawn = (each[:SHOWN].float() for each in self._shown)
        return side_by_side([F.interpolate(each, subjects.shape[2:]) for each in (subjects, targets, drawn)])

    def _draw(self, pixel_values: Tensor, words: Sequence[str]) -> Tensor:
        encoder = self.pipeline.encoder
        vectors = encoder.projection(ask(encoder, pixel_values, words))  # [B, Q, width]
        pixels = self.head(rearrange(vectors, "b q w -> b (q w)"))
        return rearrange(pixels, "b (c h w) -> b c h w", c=3, h=self.edge).float()
