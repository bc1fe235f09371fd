"""CLIPSeg from a folder, against transformers' own way of calling it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from blip_qformer.imaging.segmentation import Segmenter
from tests.clipseg import write_clipseg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clipseg(tmp_path_factory.mktemp("clipseg"))


@pytest.fixture(scope="module")
def segment(folder) -> Segmenter:
    return Segmenter(folder)


def test_probabilities_are_those_of_transformers(folder, segment):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 48, 80, 3), dtype=np.uint8)
    found = segment(torch.from_numpy(pixels).float() / 255, "teddy bear")
    assert (found.shape, found.dtype) == ((2, 48, 80), torch.float32)

    inputs = CLIPSegProcessor.from_pretrained(folder)(
        text=["teddy bear"] * 2, images=[Image.fromarray(each) for each in pixels], return_tensors="pt"
    )
    with torch.no_grad():
        logits = CLIPSegForImageSegmentation.from_pretrained(folder).eval()(**inputs).logits  # [2, 64, 64]
    for row, each in zip(found, logits.sigmoid(), strict=True):
        expected = Image.fromarray(each.numpy(), "F").resize((80, 48), Image.Resampling.BILINEAR)
        assert np.abs(row.numpy() - np.array(expected)).max() < 1e-4
    assert found.std() > 0.05


def test_the_word_decides_and_a_batch_does_not(segment):
    images = torch.rand(3, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    dog = segment(images, "dog")
    assert (segment(images, "a long name for a cat") - dog).abs().max() > 0.05
    torch.testing.assert_close(segment(images[1:2], "dog"), dog[1:2], atol=1e-5, rtol=0)


def test_a_missing_or_other_checkpoint_gets_one_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config.json is missing\): download one with hf download CIDAS/clipseg-rd64"):
        Segmenter(tmp_path / "gone")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="cannot be read as a CLIPSeg .* download CIDAS/clipseg-rd64-refined again"):
        Segmenter(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="cannot be read as a CLIPSeg"):
        Segmenter(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a CLIPSeg .* download CIDAS/clipseg-rd64-refined again"):
        Segmenter(tmp_path)


def test_a_folder_of_git_lfs_pointers_is_named(folder, tmp_path):
    """What git clone leaves without git-lfs: texts are there, weights are pointers."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=rf"^{weights} is a git-lfs pointer.*run git lfs pull"):
        Segmenter(tmp_path)


def test_a_loaded_clipseg_does_not_depend_on_its_file(tmp_path):
    folder = write_clipseg(tmp_path)
    segment, image = Segmenter(folder), torch.rand(1, 48, 80, 3)
    expected = segment(image, "dog")
    os.truncate(folder / "model.safetensors", 0)
    assert torch.equal(segment(image, "dog"), expected)
