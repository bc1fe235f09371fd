"""The cache of latents: encoded once, and once more where the disk has damaged a file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip_qformer.data.latent_cache import LatentCache


class Encoder:
    """A VAE whose latents are the image's mean; it counts."""

    def __init__(self) -> None:
        self.encoder, self.count = torch.nn.Linear(2, 2), 0
        torch.nn.init.zeros_(self.encoder.weight)
        torch.nn.init.zeros_(self.encoder.bias)

    def encode(self, image: torch.Tensor, return_dict: bool) -> list[Any]:
        self.count += 1
        latent = image.mean(dim=1, keepdim=True).expand(-1, 4, -1, -1)
        return [SimpleNamespace(mean=latent, std=latent.abs())]


def damage(file, kind):
    tensors = load_file(file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "lacking":
        save_file({"mean": tensors["mean"]}, file)
    elif kind == "NaN":
        save_file({**tensors, "mean": tensors["mean"] * float("nan")}, file)
    else:
        save_file({**tensors, "mean": tensors["mean"][:, :1].clone()}, file)


@pytest.mark.parametrize("kind", ["truncated", "empty", "lacking", "NaN", "of another shape"])
def test_a_damaged_file_is_encoded_again(tmp_path, kind, caplog):
    vae, images = Encoder(), torch.rand(2, 3, 8, 8)
    cache = LatentCache(tmp_path, cast("Any", vae), 8)
    first = cache.encode(images)
    assert torch.equal(cache.encode(images)[0], first[0])
    assert vae.count == 2
    file = next(tmp_path.rglob("*.safetensors"))
    whole = file.read_bytes()
    damage(file, kind)
    again = cache.encode(images)
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])
    assert vae.count == 3
    assert file.read_bytes() == whole
    assert str(file) in caplog.text
