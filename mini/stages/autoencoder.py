"""The VAE, for a model that has none to start from: a picture through latents an eighth of its size and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from blip_qformer.data.collate import Batch, autoencoder_batch
from blip_qformer.data.pairs import Pair
from blip_qformer.training.config import RunConfig
from blip_qformer.training.stages.base import Stage, generators, normal, side_by_side

SHOWN = 4


MEASURED = 8  # batches


class AutoencoderStage(Stage):
    """Absolute error of pixels and of their differences, and a light pull of the latents towards a normal.

    The VAE is convolutional but for one attention in its middle, so that it learns from crops, which cost less.

    Options:
        crop: edge of the square it learns from, in pixels, a multiple of 8.
        edge_weight: of the error of neighbouring pixels' differences, which keeps contours sharp.
        divergence_weight: of the Kullback-Leibler divergence.
    """

    name = "autoencoder"
    uses = trains = ("vae",)

    def _set(self, crop: int = 64, edge_weight: float = 1.0, divergence_weight: float = 1e-6) -> None:
        if crop < 8 or crop % 8:
            raise ValueError(
                f"The option crop is {crop}, but the VAE halves a picture three times: take a multiple of 8."
            )
        self.crop, self.edge_weight, self.divergence_weight = crop, edge_weight, divergence_weight

    @classmethod
    def collate(cls, config: RunConfig) -> Callable[[Sequence[Pair]], Batch]:
        return partial(autoencoder_batch, crop=cls.options(config)["crop"])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sources = generators(batch["seeds"])
        pixels = self._crops(batch, sources)
        distribution = self.pipeline.vae.encode(pixels * 2 - 1).latent_dist
        mean, deviation = distribution.mean.float(), distribution.std.float()
        latents = mean + deviation * normal(sources, mean.shape[1:], mean.device)
        decoded = self.pipeline.vae.decode(latents).sample.float() / 2 + 0.5
        self._last = pixels.detach(), decoded.detach()
        error = F.l1_loss(decoded, pixels)
        edges = sum(F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3))
        divergence = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).sum(dim=(1, 2, 3)).mean()
        loss = error + self.edge_weight * edges + self.divergence_weight * divergence
        return {"loss": loss, "error": error.detach(), "edges": edges.detach(), "divergence": divergence.detach()}

    def samples(self) -> Image.Image:
        pictures, decoded = self._last
        return side_by_side([pictures[:SHOWN], decoded[:SHOWN]])

    @torch.no_grad()
    def finish(self, batches: Iterator[Batch]) -> None:
        """Scale the latents to a deviation of one, where noise begins: the U-Net never sees another."""
        crops = [self._crops(batch, generators(batch["seeds"])) for batch in islice(batches, MEASURED)]
        latents = torch.cat([self.pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean for pixels in crops])
        self.pipeline.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))

    def _crops(self, batch: Batch, sources: Sequence[torch.Generator]) -> Tensor:
        """A square of each picture -> [B, 3, crop, crop]."""
        pairs = zip(batch["pixels"], sources, strict=True)
        crops = torch.stack([self._crop(picture, source) for picture, source in pairs])
        return crops.to(next(self.pipeline.vae.parameters()).device)

    def _crop(self, picture: Tensor, source: torch.Generator) -> Tensor:
        height, width = picture.shape[1:]
        top, left = (
            int(torch.randint(max(1, edge - self.crop + 1), (1,), generator=source)) for edge in (height, width)
        )
        return picture[:, top : top + self.crop, left : left + self.crop]
