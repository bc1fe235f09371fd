"""The VAE, for a model that has none to start from: an image through latents an eighth of its size and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from blip_qformer.data.collate import Batch
from blip_qformer.training.options import LatentEdge, Number, OptionGroup
from blip_qformer.training.stages.base import CollateFn, Stage, encode_images, image_grid, make_generators

from .collate import autoencoder_batch

MAX_SAMPLES = 4


MEASURED_BATCHES = 8  # for the scale of the latents


class AutoencoderStage(Stage):
    """Absolute error of pixels and of their differences, and a light pull of the latents towards a normal.

    The VAE is convolutional but for one attention in its middle, so that it learns from crops, which cost less.
    """

    name = "autoencoder"
    uses = trains = ("vae",)

    class Options(OptionGroup):
        """Options of the autoencoder stage.

        Args:
            crop: Edge of the square that is cropped from each image, in pixels.
            edge_weight: Weight of the error of neighbouring pixels' differences, which keeps contours sharp.
            divergence_weight: Weight of the Kullback-Leibler divergence.
        """

        crop: LatentEdge = 64
        edge_weight: Number = 1.0
        divergence_weight: Number = 1e-6

    options: Options

    @property
    def collate_fn(self) -> CollateFn:
        """Images of their own sizes."""
        return partial(autoencoder_batch, crop=self.options.crop)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted sum of the three losses, and each of them."""
        generators = make_generators(batch["seeds"])
        pixels = self._crop_all(batch, generators)  # [B, 3, crop, crop]
        mean, deviation = encode_images(self.pipeline.vae, pixels)  # [B, 4, crop / 8, crop / 8] each
        latents = mean + deviation * randn_tensor(mean.shape, generators, mean.device)
        output = self.pipeline.vae.decode(latents)  # pyright: ignore[reportArgumentType]  # diffusers means a Tensor
        decoded = cast(DecoderOutput, output).sample.float() / 2 + 0.5
        self._last_images = pixels.detach(), decoded.detach()
        error = F.l1_loss(decoded, pixels)
        down, across = (F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3))
        edges = down + across
        divergence = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).sum(dim=(1, 2, 3)).mean()
        loss = error + self.options.edge_weight * edges + self.options.divergence_weight * divergence
        return {"loss": loss, "error": error.detach(), "edges": edges.detach(), "divergence": divergence.detach()}

    def samples(self) -> Image.Image:
        """Show crops of the last batch above what the VAE makes of them."""
        return image_grid([each[:MAX_SAMPLES] for each in self._last_images])

    @torch.no_grad()
    def finish(self, batches: Iterator[Batch]) -> None:
        """Scale the latents to a deviation of one, where noise begins: the U-Net never sees another.

        Args:
            batches: Batches to measure the latents of.
        """
        crops = [self._crop_all(batch, make_generators(batch["seeds"])) for batch in islice(batches, MEASURED_BATCHES)]
        latents = torch.cat([encode_images(self.pipeline.vae, pixels)[0] for pixels in crops])
        self.pipeline.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))

    def _crop_all(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Crop a square of each image, to [B, 3, crop, crop] on the VAE's device."""
        pairs = zip(batch["pixels"], generators, strict=True)
        crops = torch.stack([self._crop(image, generator) for image, generator in pairs])
        return crops.to(next(self.pipeline.vae.parameters()).device)

    def _crop(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """[3, H, W] -> [3, crop, crop]."""
        crop = self.options.crop
        top, left = (int(torch.randint(edge - crop + 1, (1,), generator=generator)) for edge in image.shape[1:])
        return image[:, top : top + crop, left : left + crop]
