"""First position embeddings: from a patch's token can be told which row and column it is in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import mini
from blip_qformer.pipeline import new_pipeline
from mini.init import initialise
from mini.init.patch_positions import initialise_patch_positions

SMALL_MODEL = Path(mini.__file__).parent / "runs" / "model.yaml"


def linear_probe(tokens: Tensor, wanted: Tensor) -> Tensor:
    """Fit to tokens [N, width] what is wanted of each [N, 2]; the layer's weights [width + 1, 2]."""
    return torch.linalg.lstsq(with_one(tokens), wanted.float(), driver="gelsd").solution  # fits any rank


def with_one(tokens: Tensor) -> Tensor:
    return torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1)


@pytest.mark.parametrize(("edge", "width"), [(8, 128), (8, 130), (16, 128), (2, 32)])
def test_row_and_column_are_linear_in_the_embedding(edge, width):
    embedding = nn.Parameter(torch.randn(1, 1 + edge**2, width))
    initialise_patch_positions(embedding)
    patches = embedding[0, 1:].detach()
    positions = torch.cartesian_prod(torch.arange(edge), torch.arange(edge))  # rows, columns
    told = with_one(patches) @ linear_probe(patches, positions)
    assert (told - positions).abs().max() < 0.2
    assert embedding[0, 0].abs().max() == 0


def test_the_small_models_first_image_encoder_tells_where_a_patch_is():
    """After all of its blocks, though an image shows other things; with random positions the probe tells nothing."""
    vision = new_pipeline(
        yaml.safe_load(SMALL_MODEL.read_text()), seed=0, initialise=initialise
    ).encoder.vision.requires_grad_(False)
    images = torch.randn(64, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    positions = torch.cartesian_prod(torch.arange(8), torch.arange(8)).repeat(32, 1).float()

    def explained() -> float:
        shown, asked = vision(images)[:, 1:].flatten(0, 1).chunk(2)
        told = with_one(asked) @ linear_probe(shown, positions)
        return 1 - ((told - positions).var() / positions.var()).item()

    assert explained() > 0.3
    nn.init.normal_(vision.position_embedding, std=0.05)
    assert explained() < 0.1
