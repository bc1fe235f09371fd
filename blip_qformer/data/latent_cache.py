"""A cache of VAE latents on disk, shared by all processes of a run and by the run after a restart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save
from torch import Tensor

from ..atomic import atomic_file, remove_partial

MEAN, STD = "mean", "deviation"  # keys in a file


class LatentCache:
    """Encodes each image once and keeps the result.

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
        paths = [self.folder / f"{_digest(image)}.safetensors" for image in images]
        for path, image in zip(paths, images, strict=True):
            if not path.is_file():
                # One by one, so that latents are the same to the last bit whichever batch an image comes in first.
                distribution = self.vae.encode(image[None] * 2 - 1, return_dict=False)[0]
                content = save({MEAN: _to_float(distribution.mean[0]), STD: _to_float(distribution.std[0])})
                with atomic_file(path, clean=False) as temporary:
                    temporary.write_bytes(content)
        latents = [load_file(path, device=str(images.device)) for path in paths]
        return torch.stack([each[MEAN] for each in latents]), torch.stack([each[STD] for each in latents])


def _digest(image: Tensor) -> str:
    """Hash an image's pixels, so that a pair that was made anew is encoded anew."""
    return hashlib.blake2b(image.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
