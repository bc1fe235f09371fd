"""A model in and out of the Hub layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from blip_qformer import load_subject_encoder
from blip_qformer.checkpoint import open_checkpoint
from blip_qformer.checkpoint.ldm_keys import stable_diffusion_checkpoint
from blip_qformer.encoder import preprocess
from blip_qformer.pipeline import Pipeline, load_pipeline, new_pipeline, replace_network, save_pipeline
from blip_qformer.pipeline import save as module
from tests import oracle, tiny
from tests.random_weights import write_hub_folder
from tools.host import comfyui_path

REFERENCE = oracle.Sizes(image_size=28, vision_width=64, vision_heads=1, width=32, text_heads=2, vae_channels=(32,) * 4)


@pytest.fixture(scope="module")
def model() -> Pipeline:
    """A model all of whose weights are random."""
    made = tiny.random_pipeline()
    made.vae.register_to_config(scaling_factor=0.9)
    return made


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    return save_pipeline(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> oracle.BlipDiffusionPipeline:
    """The reference with random weights."""
    return oracle.pipeline(REFERENCE, tmp_path_factory.mktemp("bert"), comfyui_path())


@pytest.fixture(scope="module")
def published(pipeline, tmp_path_factory) -> Path:
    """Its folder as it is published, tokenizer included."""
    folder = write_hub_folder(pipeline, tmp_path_factory.mktemp("published") / "model")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def weights_of(model: Pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": weight
        for name, network in model.networks.items()
        for key, weight in network.state_dict().items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


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


def test_the_published_layout_is_read(pipeline, published):
    """Pickles, and everything that the reference computes with them."""
    model = load_pipeline(published)
    pixels = preprocess(torch.rand(2, 40, 40, 3), size=28)
    with torch.no_grad():
        found = model.encoder(pixels, ["dog", "teddy bear"])
    expected = pipeline.get_query_embeddings(pixels, ["dog", "teddy bear"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert_same(model.unet.state_dict(), pipeline.unet.state_dict())
    assert_same(model.vae.state_dict(), pipeline.vae.state_dict())


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


def test_a_network_may_come_from_another_folder(model, pipeline, published):
    """As a new Q-Former's U-Net, text encoder and VAE come from Stable Diffusion."""
    mixed = new_pipeline(tiny.SIZES, seed=0)
    for name in ("unet", "encoder"):
        replace_network(mixed, name, published)
    assert_same(mixed.unet.state_dict(), pipeline.unet.state_dict())
    assert_same(mixed.encoder.state_dict(), load_pipeline(published).encoder.state_dict())
    assert mixed.text_encoder.config == model.text_encoder.config
    replace_network(mixed, "unet", published / "unet")  # the folder of the network itself
    with pytest.raises(ValueError, match='"clip" is no network of the model: choose encoder, text_encoder, unet, vae'):
        replace_network(mixed, "clip", published)
    with pytest.raises(ValueError, match="has no vae: name a folder"):
        replace_network(mixed, "vae", published / "unet")


def test_the_first_weights_are_a_function_of_the_seed(model):
    first, same, other = (weights_of(new_pipeline(tiny.SIZES, seed)) for seed in (1, 1, 2))
    assert_same(same, first)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])
    for name, weight in first.items():
        if weight.ndim > 1 and not name.startswith(("unet", "vae", "encoder.vision.position_embedding")):
            deviation = 0.02 * (768 / 32) ** 0.5  # BERT's 0.02, at the width of all of these
            assert weight.std() == pytest.approx(deviation, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vae": None, "clip": {}}, "A new model is given by vision, .* look at clip, vae"),
        ({"unet": {"colour": 1}}, "sizes of the new model's unet do not fit: .*colour"),
        ({"vision": {"colour": 1}}, "sizes of the new model's vision do not fit: .*colour"),
        ({"tokenizer": "nowhere"}, "The folder nowhere of the tokenizer has no vocab.json"),
    ],
)
def test_sizes_that_do_not_fit_get_one_sentence(changes, sentence):
    sizes = {name: value for name, value in (tiny.SIZES | changes).items() if value is not None}
    with pytest.raises(ValueError, match=sentence):
        new_pipeline(sizes, seed=0)


def test_widths_that_do_not_meet_get_one_sentence():
    sizes = {**tiny.SIZES, "text_encoder": {**tiny.SIZES["text_encoder"], "width": 64}}
    with pytest.raises(
        ValueError, match="vectors are 32 numbers wide, the text encoder's words 64, and what the U-Net re"
    ):
        tiny.make_stage("subject", model=sizes)


def test_a_folder_that_is_not_whole_gets_one_sentence(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer/vocab.json: download"):
        load_pipeline(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(ValueError, match="unet.*does not fit its own config .*Missing key"):
        load_pipeline(folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(ValueError, match="has no unet"):
        load_pipeline(folder)


def test_the_library_itself_needs_nothing_of_training():
    """Neither what ComfyUI imports nor the command line, until a run is started."""
    program = """
import sys
import blip_qformer, blip_qformer.cli
extras = {"accelerate", "diffusers", "tensorboard", "webdataset", "yaml"}
print(sorted({name.partition(".")[0] for name in sys.modules} & extras))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
