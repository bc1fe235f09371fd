"""The stages of the small model, where they differ from the paper's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blip_qformer.training.stages import find_stage, read_options
from mini.stages import STAGES
from tests import tiny

NUMBERS = range(6)


def test_the_papers_stages_are_among_them():
    assert set(STAGES) == {"autoencoder", "vision", "multimodal", "appearance", "subject"}
    with pytest.raises(
        ValueError, match='no stage "dream": choose one of multimodal, subject, autoencoder, vision, appearance'
    ):
        find_stage("dream", STAGES)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    config = tiny.make_config("autoencoder", options={"divergence_weight": "1e-3"})
    options = read_options(STAGES["autoencoder"], config)
    assert options.model_dump() == {"crop": 64, "edge_weight": 1.0, "divergence_weight": 0.001}


def test_the_vae_sees_crops_and_keeps_its_latents_at_one():
    """Also of images that are smaller than a crop."""
    stage = tiny.make_stage("autoencoder", options={"crop": 48})
    batch = tiny.make_batch("autoencoder", NUMBERS, crop=48)
    assert {tuple(pixels.shape) for pixels in batch["pixels"]} == {(3, 48, 48)}
    stage = tiny.make_stage("autoencoder")
    batch = tiny.make_batch("autoencoder", NUMBERS)
    crops = stage._crop_all(batch, [torch.Generator().manual_seed(seed) for seed in batch["seeds"]])
    assert crops.shape == (6, 3, 16, 16)
    for crop, image in zip(crops, batch["pixels"], strict=True):
        windows = image.unfold(1, 16, 1).unfold(2, 16, 1)  # [3, 17, 17, 16, 16]
        assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).any()
    stage.finish(iter([batch, tiny.make_batch("autoencoder", range(6, 12))]))
    factor = stage.pipeline.vae.config.scaling_factor
    latents = stage.pipeline.vae.encode(crops * 2 - 1).latent_dist.mean * factor
    assert factor != 0.18215
    assert latents.std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("name", "size"),
    [("autoencoder", (4 * 16, 2 * 16)), ("appearance", (6 * 28, 3 * 28)), ("subject", (6 * 32, 3 * 32))],
)
def test_a_sheet_shows_how_far_it_has_come(name, size):
    stage = tiny.make_stage(name, options={**tiny.OPTIONS[name]})
    stage(tiny.make_batch(name, NUMBERS))
    with torch.no_grad():
        sheet = stage.eval().samples()
    assert sheet.size == size
    assert np.asarray(sheet).std() > 10


def test_location_is_the_cross_entropy_of_row_and_column():
    stage = tiny.make_stage("vision")
    patches = stage.patches
    tokens = torch.randn(3, patches**2, stage.location_head.in_features)
    logits = stage.location_head(tokens)  # of rows first, then of columns
    losses = [
        F.cross_entropy(logits[image, patch, axis * patches : (axis + 1) * patches], torch.tensor(index))
        for image in range(3)
        for patch in range(patches**2)
        for axis, index in enumerate(divmod(patch, patches))
    ]
    assert stage._location_loss(tokens).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
