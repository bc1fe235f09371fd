"""A cache of VAE latents on disk, shared by all processes of a run and by the run after a restart."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch import Tensor

from ..atomic import atomic_file, remove_partial
from ..checkpoint.read_tensors import CheckpointError, read_tensors
from ..checkpoint.weights import is_finite

MEAN, STD = "mean", "deviation"  # keys in a file

logger = logging.getLogger("blip_diffusion")


class LatentCache:
    """Encodes each image once and keeps the result; what a disk has damaged is encoded again.

    Args:
        folder: Folder for the files; each VAE and resolution has a folder of its own in it.
        vae: The VAE.
        resolution: Edge of the images in pixels.
    """

    def __init__(self, folder: Path, vae: AutoencoderKL, resolution: int) -> None:
        digest = hashlib.sha256()
        for name, weight in vae.encoder.state_dict().items():
            digest.update(name.encode() + weight.detach().cpu().float().numpy().tobytes())
        self.vae, self.folder = vae, folder / f"{resolution}-{digest.hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partial(self.folder)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images, or read what was encoded before.

        Args:
            images: Images of shape [B, 3, H, W] in 0..1.

        Returns:
            Mean and standard deviation of the latents' distribution, each of shape [B, 4, h, w].
        """
        latents = [self._latents(image) for image in images]
        mean, std = (torch.stack(each).to(images.device) for each in zip(*latents, strict=True))
        return mean, std

    def _latents(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [4, h, w] of one image [3, H, W], on the CPU."""
        path = self.folder / f"{_digest(image)}.safetensors"
        if path.is_file():
            try:
                return _read(path)
            except CheckpointError as error:
                logger.warning("%s The image is encoded again.", error)
        # One by one, so that latents are the same to the last bit whichever batch an image comes in first.
        distribution = self.vae.encode(image[None] * 2 - 1, return_dict=False)[0]
        mean, std = _to_float(distribution.mean[0]), _to_float(distribution.std[0])
        with atomic_file(path, clean=False) as temporary:
            temporary.write_bytes(save({MEAN: mean, STD: std}))
        return mean, std


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file.

    Raises:
        CheckpointError: It is not what was written.
    """
    tensors = read_tensors(path)
    if tensors.keys() != {MEAN, STD}:
        raise CheckpointError(f"{path} holds no latents.")
    mean, std = tensors[MEAN], tensors[STD]
    is_whole = mean.shape == std.shape and mean.ndim == 3
    if not is_whole or not all(each.dtype == torch.float32 and is_finite(each) for each in (mean, std)):
        raise CheckpointError(f"{path} holds no latents.")
    return mean, std


def _digest(image: Tensor) -> str:
    """Hash an image's pixels, so that a pair that was made anew is encoded anew."""
    return hashlib.blake2b(image.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float().cpu().contiguous()
