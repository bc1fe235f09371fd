"""A model written in the Hub layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from blip_qformer import load_subject_encoder
from blip_qformer.checkpoint import open_checkpoint
from blip_qformer.checkpoint.ldm_keys import stable_diffusion_checkpoint
from blip_qformer.encoder import preprocess
from blip_qformer.pipeline import load_pipeline, save_pipeline
from blip_qformer.pipeline import save as module
from tests import oracle
from tests.pipeline.weights import assert_same, weights_of


def test_what_is_saved_comes_back_bit_for_bit(model, saved):
    again = load_pipeline(saved)
    assert_same(weights_of(again), weights_of(model))
    assert again.encoder.config == model.encoder.config
    assert again.text_encoder.config == model.text_encoder.config
    assert again.vae.config.scaling_factor == 0.9
    assert again.tokenizer("a teddy bear").input_ids == model.tokenizer("a teddy bear").input_ids


def test_the_library_opens_it(model, saved):
    checkpoint = open_checkpoint(saved)
    assert checkpoint.format == "Hub folder"
    assert checkpoint.problems == ()
    stable_diffusion_checkpoint(*(checkpoint.require(name).state_dict() for name in ("unet", "text_encoder", "vae")))
    pixels = preprocess(torch.rand(1, 40, 40, 3), size=28)
    assert torch.equal(load_subject_encoder(saved)(pixels, ["dog"]), model.encoder(pixels, ["dog"]))


def test_the_reference_opens_it(model, saved, tmp_path):
    """diffusers' classes, each from its own folder; its Q-Former asks the Hub for the vocabulary if not told better."""
    assert_same(UNet2DConditionModel.from_pretrained(saved / "unet").state_dict(), model.unet.state_dict())
    assert_same(AutoencoderKL.from_pretrained(saved / "vae").state_dict(), model.vae.state_dict())
    text_encoder = oracle.ContextCLIPTextModel.from_pretrained(saved / "text_encoder")
    assert_same(
        {k: v for k, v in text_encoder.state_dict().items() if "position_ids" not in k},
        model.text_encoder.hub_state_dict(),
    )
    folder = shutil.copytree(saved / "qformer", tmp_path / "qformer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer": str(folder)}))
    qformer = oracle.Blip2QFormerModel.from_pretrained(folder)
    pixels = preprocess(torch.rand(1, 40, 40, 3), size=28)
    expected = qformer(image_input=pixels, text_input=["teddy bear"], return_dict=False)
    torch.testing.assert_close(model.encoder(pixels, ["teddy bear"]), expected, atol=1e-5, rtol=0)


def test_half_precision_is_half_the_size(model, saved, tmp_path):
    half = save_pipeline(model, tmp_path / "half", torch.float16)

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    assert size(half) == pytest.approx(size(saved) / 2, rel=0.02)
    found, expected = weights_of(load_pipeline(half)), weights_of(model)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.half().float())


def test_a_model_is_replaced_by_a_whole_one_or_stays(model, tmp_path, monkeypatch):
    folder = save_pipeline(model, tmp_path / "model")
    (folder / "notes.txt").write_text("old")
    monkeypatch.setattr(module, "MODEL_INDEX", object())  # what is written last
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_pipeline(model, folder)
    assert (folder / "notes.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    save_pipeline(model, folder)
    assert not (folder / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
