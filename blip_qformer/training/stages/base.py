"""What every training stage has in common: a model with its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torch import Tensor, nn

from ...data.collate import Batch
from ...data.pairs import Pair
from ...imaging.pil import to_pil_image as from_channels_last
from ...pipeline import Pipeline
from ..options import OptionGroup

CollateFn = Callable[[Sequence[Pair]], Batch]


class Stage(nn.Module, ABC):
    """A model with its loss.

    ``forward`` turns a batch into losses, so that whatever wraps a model (several GPUs, several machines) wraps the
    loss with it. A batch holds what :attr:`collate_fn` made of some pairs, and ``seeds``, a number for each of them:
    everything random about a pair comes from its own seed, so that a run is the same however many processes share it,
    and the same after it was resumed. A loss is averaged so that the mean of all processes' losses is that of one
    process with all their pairs.

    A subclass must define five things: ``name`` (the stage's name in a run's file), ``uses`` (the networks that it
    needs), ``trains`` (the modules of those networks that train), :attr:`collate_fn` (a function that makes a batch of
    pairs) and :meth:`forward` (the losses of a batch). If it has options, they are its class ``Options``. If the loss
    needs heads, a constructor with the same arguments adds them. :meth:`samples` and :meth:`finish` may be overridden.

    Args:
        pipeline: Model that trains, changed in place.
        options: Options of the stage.
        output: Folder of the run, for what a stage keeps on disk.
    """

    #: Class of the stage's options.
    Options: ClassVar[type[OptionGroup]] = OptionGroup

    #: Name of the stage in a run's file.
    name: ClassVar[str]

    #: Networks of the model that this stage needs: ``encoder``, ``text_encoder``, ``unet``, ``vae``.
    uses: ClassVar[tuple[str, ...]]

    #: Modules of them that train, such as ``unet`` or ``encoder.qformer``; the rest is frozen.
    trains: ClassVar[tuple[str, ...]]

    def __init__(self, pipeline: Pipeline, options: OptionGroup, output: Path):
        super().__init__()
        self.pipeline, self.options, self.output = pipeline, options, output
        self.networks = nn.ModuleDict({name: pipeline.networks[name] for name in self.uses})
        self.networks.requires_grad_(False)
        for name in self.trains:
            self.networks.get_submodule(name).requires_grad_(True)

    @property
    @abstractmethod
    def collate_fn(self) -> CollateFn:
        """Function that makes a batch of pairs; it runs in the workers."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            batch: Batch with ``seeds``, on the model's device.

        Returns:
            Losses and other metrics by name, each averaged over the batch; ``loss`` is the one that is minimised.
        """

    def samples(self) -> Image.Image | None:
        """Make an image that shows how far training has come, or None where there is nothing to see."""
        return None

    def finish(self, batches: Iterator[Batch]) -> None:
        """Measure on the trained weights what is saved with them.

        Args:
            batches: Batches after those of the last step.
        """

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that train, in an order that does not change."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def image_size(self) -> int:
        """Edge of the square that the image encoder reads, in pixels."""
        return self.pipeline.encoder.config.vision.image_size


def make_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """Make one generator for each seed, on the CPU so that its numbers are the same on every device.

    Args:
        seeds: Seed of each pair.

    Returns:
        Generator of each pair.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images with a VAE.

    Args:
        vae: VAE.
        images: Images of shape [B, 3, H, W] in 0..1.

    Returns:
        Mean and standard deviation of the latents, each of shape [B, 4, H / 8, W / 8], in float32 and not scaled.
    """
    output = cast(AutoencoderKLOutput, vae.encode(images * 2 - 1))
    return output.latent_dist.mean.float(), output.latent_dist.std.float()


def to_pil_image(pixels: Tensor) -> Image.Image:
    """Convert pixels to an image.

    Args:
        pixels: Pixels of shape [3, H, W] in 0..1.

    Returns:
        Image in RGB.
    """
    return from_channels_last(pixels.permute(1, 2, 0))


def image_grid(rows: Iterable[Iterable[Tensor]]) -> Image.Image:
    """Put rows of images below each other.

    Args:
        rows: Rows of images of one size, each image of shape [3, H, W] in 0..1; all rows are of one length.

    Returns:
        Image in RGB.
    """
    return to_pil_image(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1))
