"""Latents of pictures that are seen many times, on disk, for all processes of a run and for the run after a restart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic import atomic_file

MEAN, DEVIATION = "mean", "deviation"


class LatentCache:
    """What a VAE makes of pictures, each encoded once.

    Args:
        folder: for the files; those of another VAE or size lie beside each other in folders of their own.
        resolution: edge of the pictures, in pixels.
    """

    def __init__(self, folder: Path, vae: AutoencoderKL, resolution: int):
        digest = hashlib.sha256()
        for name, weight in vae.encoder.state_dict().items():
            digest.update(name.encode() + weight.detach().cpu().float().numpy().tobytes())
        self.vae, self.folder = vae, folder / f"{resolution}-{digest.hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, 4, h, w] of each picture's latents; pictures are [B, 3, H, W] in 0..1."""
        paths = [self.folder / f"{_digest(picture)}.safetensors" for picture in pictures]
        for path, picture in zip(paths, pictures, strict=True):
            if not path.is_file():
                # Each alone, so that its latents are the same to the last bit whichever batch it comes in first.
                distribution = self.vae.encode(picture[None] * 2 - 1).latent_dist
                with atomic_file(path) as temporary:
                    save_file({MEAN: _plain(distribution.mean[0]), DEVIATION: _plain(distribution.std[0])}, temporary)
        kept = [load_file(path, device=str(pictures.device)) for path in paths]
        return torch.stack([each[MEAN] for each in kept]), torch.stack([each[DEVIATION] for each in kept])


def _digest(picture: Tensor) -> str:
    """A name for what is in a picture, which pairs that were made anew do not share with the old ones."""
    return hashlib.blake2b(picture.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
