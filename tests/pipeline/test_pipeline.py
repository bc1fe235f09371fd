"""A model read from the Hub layout, and put together of several."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from blip_qformer.encoder import preprocess
from blip_qformer.pipeline import load_pipeline, new_pipeline, replace_network
from tests import tiny
from tests.pipeline.weights import assert_same


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


def test_a_folder_that_is_not_whole_gets_one_sentence(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer has no vocab.json, which .*: download"):
        load_pipeline(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(ValueError, match="unet.*does not fit its own config .*its config tells of 2"):
        load_pipeline(folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(ValueError, match="has no unet"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("unet", {"layers_per_block": 40}, "down_blocks.0.resnets and its config tells of 40"),
        ("unet", {"down_block_types": ["x", "y"]}, "does not fit its own config"),
        ("unet", {"norm_num_groups": 7}, "does not fit its own config"),
        ("vae", {"block_out_channels": [32]}, "does not fit its own config"),
        ("text_encoder", {"num_attention_heads": 7}, "a width of 32 cannot be shared by 7 heads"),
        ("text_encoder", {"vocab_size": 10}, "does not fit its own config"),
    ],
)
def test_a_config_that_asks_for_another_network_is_refused(saved, tmp_path, part, changes, sentence):
    """diffusers would build whatever it asks for, and raise what it likes."""
    folder = shutil.copytree(saved, tmp_path / "model")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=sentence) as error:
        load_pipeline(folder)
    assert str(folder / part) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("merges.txt", None, "has no merges.txt, which CLIP's tokenizer needs"),
        ("vocab.json", None, "has no vocab.json"),
        ("vocab.json", "[" * 100_000, "holds no whole tokenizer"),
        ("vocab.json", "[]", "holds no whole tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_named(saved, tmp_path, name, content, sentence):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "tokenizer" / name).unlink()
    if content is not None:
        (folder / "tokenizer" / name).write_text(content)
    with pytest.raises(ValueError, match=sentence) as error:
        load_pipeline(folder)
    assert str(folder / "tokenizer") in str(error.value)


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
