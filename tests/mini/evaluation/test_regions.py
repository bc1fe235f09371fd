"""Several things in one image: mixed as said, judged as said, and sampled once."""

import numpy as np
import pytest
import torch
from PIL import Image

from mini.evaluation import regions
from mini.evaluation.regions import (
    MASKS,
    MASKS_ALONE,
    REGIONS,
    REGIONS_ALONE,
    RegionsSettings,
    denoise_by_attention,
    denoise_by_masks,
    evaluate_regions,
    judge_regions,
    make_groups,
    prompt_weights,
)
from tests.artwork import write_artwork

SETTINGS = RegionsSettings(pictures=2, steps=2, edge=64, candidates=2)


class ColourJudges:
    """Subjects are known by their mean colour."""

    def embed(self, images):
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)) - 0.5, dim=1)


@pytest.fixture(autouse=True)
def two_things(monkeypatch):
    """The small artwork folder has four held-out things."""
    monkeypatch.setattr(regions, "COUNTS", (2,))


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork"))


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 8, 16, generator=generator).repeat(2, 1, 1, 1)
    context = torch.randn(4, 77, 32, generator=generator)  # scene, two regions, negative
    return latents, torch.full((2,), 401), context


def test_weights_add_up_and_are_those_of_the_stock_graph():
    context = torch.zeros(4, 77, 32)
    for way in (REGIONS, REGIONS_ALONE, MASKS, MASKS_ALONE):
        weights = prompt_weights(context, way, SETTINGS, 8)
        torch.testing.assert_close(weights.sum(dim=0), torch.ones(1, 8, 16))
    at = {way: prompt_weights(context, way, SETTINGS, 8)[:, 0, 4, 4].tolist() for way in (REGIONS, MASKS, MASKS_ALONE)}
    assert at[MASKS] == [0.5, 0.5, 0]  # the host divides the sum of predictions by the sum of their masks
    assert at[MASKS_ALONE] == [0, 1, 0]
    assert at[REGIONS] == pytest.approx([0.2, 0.8, 0])


@torch.no_grad()
def test_predictions_are_mixed_and_attentions_are_mixed(tiny_pipeline):
    """One prompt everywhere is the plain U-Net in both; with several, the first mixes what each of them predicts."""
    unet = tiny_pipeline.unet
    latents, timesteps, context = inputs()
    plain = unet(latents, timesteps, torch.stack([context[3], context[1]])).sample
    alone = torch.tensor([0.0, 1, 0])[:, None, None, None].expand(3, 1, 8, 16)
    own = torch.stack([context[3], context[0]])
    for denoise in (denoise_by_attention, denoise_by_masks):
        with denoise(unet, context[:3], alone) as denoiser:
            torch.testing.assert_close(denoiser(latents, timesteps, own), plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(unet(latents, timesteps, own[[0, 1]]).sample[0], plain[0], atol=1e-5, rtol=1e-4)

    weights = prompt_weights(context, MASKS_ALONE, SETTINGS, 8)
    predicted = [unet(latents[:1], timesteps[:1], each[None]).sample[0] for each in context[:3]]
    expected = torch.stack(predicted).mul(weights).sum(dim=0)
    with denoise_by_masks(unet, context[:3], weights) as denoiser:
        torch.testing.assert_close(denoiser(latents, timesteps, own)[1], expected, atol=1e-5, rtol=1e-4)
    with denoise_by_attention(unet, context[:3], weights) as denoiser:
        regional = denoiser(latents, timesteps, own)
    torch.testing.assert_close(regional[0], plain[0], atol=1e-5, rtol=1e-4)
    assert (regional[1] - expected).abs().max() > 1e-4
    assert (regional[1] - plain[1]).abs().max() > 1e-4


def test_a_region_is_judged_by_what_is_in_it():
    """Right where its own colour is, bleeding where the other one's is."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    judges = ColourJudges()
    references = judges.embed(torch.tensor(colours)[..., None, None] / 255.0)
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = colours[0], colours[1]
    right = judge_regions(judges, references, [0, 1], Image.fromarray(image), 3, seed=0)
    assert (right.identity, right.bleeding, right.likeness) == (1, 0, pytest.approx(1))
    swapped = judge_regions(judges, references, [1, 0], Image.fromarray(image), 3, seed=0)
    assert (swapped.identity, swapped.bleeding) == (0, 1)
    mean = float((references[1] @ references[2:].T).mean() + (references[0] @ references[2:].T).mean()) / 2
    assert swapped.excess == pytest.approx(1 - mean, abs=1e-5)  # each is wholly the other one
    image[:, 32:] = colours[0]
    both = judge_regions(judges, references, [0, 1], Image.fromarray(image), 3, seed=0)
    assert (both.identity, both.bleeding) == (0.5, 0.5)


def test_images_are_sampled_once(artwork, tiny_pipeline, tmp_path):
    """A second call judges the files of the first, and samples what is missing to the same pixels."""
    lines = []
    report, sheet = evaluate_regions(tiny_pipeline, ColourJudges(), artwork, tmp_path, SETTINGS, lines.append)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(lines) == 2 * 4
    assert sheet.size == (2 * 132 + 5 * (256 + 4), 2 * 132)  # two references, five pictures of two squares
    before, noted = files[3].read_bytes(), len(lines)
    files[3].unlink()
    again, _ = evaluate_regions(tiny_pipeline, ColourJudges(), artwork, tmp_path, SETTINGS, lines.append)
    assert len(lines) == noted + 1
    assert files[3].read_bytes() == before
    assert again.table() == report.table()
    assert "| 2 | real pictures (what the judges are worth) | " in report.table()
    assert f"| 2 | {REGIONS} | {MASKS} | " in report.table()


def test_no_thing_is_used_twice_and_too_few_are_named(artwork):
    groups = make_groups(artwork, SETTINGS)
    words = [case.artwork.word for group in groups for case in group]
    assert len(set(words)) == len(words) == 4
    assert all(group[0].background is group[1].background is not group[0].reference_background for group in groups)
    with pytest.raises(ValueError, match="There are 4 held-out things for 3 pictures"):
        make_groups(artwork, RegionsSettings(pictures=3, edge=64, candidates=2))
