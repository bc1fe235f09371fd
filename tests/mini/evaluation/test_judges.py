"""The judges learn to know a subject again and to tell backgrounds apart, from images alone."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blip_qformer.data.collate import to_pixels
from mini.evaluation.judges import Judges, JudgesTraining, load_judges, save_judges, train_judges
from mini.world.backgrounds import BACKGROUNDS
from mini.world.scenes import Appearance, render_background, render_scene, sample_box
from mini.world.source import artwork_of_split
from tests.artwork import write_artwork


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork"))


@pytest.fixture(scope="module")
def judges(artwork):
    return train_judges(artwork, JudgesTraining(steps=60, batch_size=16), progress=lambda line: None)


def test_backgrounds_are_told_apart(judges):
    rng = np.random.default_rng(3)
    images = torch.stack(
        [to_pixels(render_background(background, 96, rng)) for background in BACKGROUNDS for _ in range(2)]
    )
    names = [background.name for background in BACKGROUNDS for _ in range(2)]
    right = sum(said == name for said, name in zip(judges.name_backgrounds(images), names, strict=True))
    assert right >= 12  # of 16; chance is 2


def test_a_subject_is_recognised_in_another_scene(judges, artwork):
    rng = np.random.default_rng(4)
    pieces = artwork_of_split(artwork, "train")[::2]
    first, second = (
        torch.stack([to_pixels(_scene(each, background, rng)) for each in pieces])
        for background in (BACKGROUNDS[0], BACKGROUNDS[6])
    )
    similarity = judges.embed(first) @ judges.embed(second).T
    assert (similarity.argmax(dim=1) == torch.arange(len(pieces))).float().mean() >= 0.6  # chance is 1 in 6


def test_embeddings_have_unit_length(judges):
    embedded = judges.embed(torch.rand(3, 3, 50, 70))
    assert torch.allclose(embedded.norm(dim=1), torch.ones(3), atol=1e-5)


def test_training_repeats(artwork):
    settings = JudgesTraining(steps=3, batch_size=4)
    first, second = (train_judges(artwork, settings, progress=lambda line: None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_saved_judges_judge_alike(judges, tmp_path):
    save_judges(judges, tmp_path / "judges.safetensors")
    images = torch.rand(4, 3, 64, 64)
    loaded = load_judges(tmp_path / "judges.safetensors")
    assert torch.allclose(loaded.embed(images), judges.embed(images), atol=5e-3)


def test_other_files_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold these judges"):
        load_judges(tmp_path / "other.safetensors")


def test_images_may_have_any_size():
    assert len(Judges().name_backgrounds(torch.rand(2, 3, 256, 192))) == 2


def _scene(artwork, background, rng):
    return render_scene(artwork, Appearance(), background, sample_box(rng), 96, int(rng.integers(1000)))
