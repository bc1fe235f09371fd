"""The model that the paper's first stage begins with, against transformers' own models with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from blip_qformer.encoder.tokenizer import bert_tokenizer
from blip_qformer.pipeline import load_pipeline
from blip_qformer.pipeline.initial_weights import initial_encoder, initial_pipeline, main
from blip_qformer.training.losses import contrastive_mask
from blip_qformer.training.stages.multimodal import run_qformer
from tests import oracle
from tests.random_weights import write_hub_folder
from tools.host import comfyui_path

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURE = {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A whole CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    config = CLIPConfig(text_config=text, vision_config={**VISION, **PICTURE}, projection_dim=8)
    made = CLIPModel(config)
    oracle.randomized(made.vision_model, seed=0)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference_bert() -> BertModel:
    """A BERT whose text has no segments."""
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        attn_implementation="eager",
    )
    made = oracle.randomized(BertModel(config), seed=1)
    made.embeddings.token_type_embeddings.weight.zero_()
    return made


@pytest.fixture(scope="module")
def bert(reference_bert, tmp_path_factory) -> Path:
    """It as bert-base-uncased was published: a pickle, with the names of its head and of its norms from then."""
    folder = tmp_path_factory.mktemp("bert")
    reference_bert.config.save_pretrained(folder)
    weights = {}
    for name, weight in reference_bert.state_dict().items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        weights[f"bert.{name}"] = weight
    torch.save({**weights, "cls.predictions.bias": torch.zeros(30522)}, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    sizes = oracle.Sizes(width=32, text_heads=2, vae_channels=(32,) * 4)
    pipeline = oracle.pipeline(sizes, tmp_path_factory.mktemp("vocabulary"), comfyui_path())
    folder = write_hub_folder(pipeline, tmp_path_factory.mktemp("sd") / "model")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def test_the_image_encoder_is_clips_without_its_last_block(clip, bert):
    encoder = initial_encoder(clip, bert)
    theirs = CLIPVisionModel.from_pretrained(clip)
    assert isinstance(theirs.config, CLIPVisionConfig)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        states = theirs(pixels, output_hidden_states=True).hidden_states
        expected = F.layer_norm(states[-2], (32,))  # the norm behind it is new
        assert len(encoder.vision.blocks) == 2
        torch.testing.assert_close(encoder.vision(pixels), expected, atol=1e-5, rtol=0)


def test_the_text_reads_as_bert_does(clip, bert, reference_bert):
    encoder = initial_encoder(clip, bert)
    encodings = [bert_tokenizer().encode(text) for text in ("a dog in the snow", "a cat")]
    for encoding in encodings:
        encoding.pad(10)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.no_grad():
        _, text = run_qformer(encoder.qformer, torch.randn(2, 5, 32), ids, mask, contrastive_mask)
        expected = reference_bert(ids, mask).last_hidden_state
    assert expected.std() > 0.1
    for row in range(2):
        length = int(mask[row].sum())
        torch.testing.assert_close(text[row, :length], expected[row, :length], atol=1e-5, rtol=0)


def test_what_is_new_is_new_and_what_is_shared_begins_alike(clip, bert):
    encoder = initial_encoder(clip, bert)
    deviation = 0.02 * (768 / 32) ** 0.5  # BERT's 0.02, at this width
    for layer in encoder.qformer.layers:
        for mine, texts in zip(
            layer.query_feed_forward.parameters(), layer.text_feed_forward.parameters(), strict=True
        ):
            assert torch.equal(mine, texts)
        assert layer.cross_attention.query.weight.std().item() == pytest.approx(deviation, rel=0.2)
    assert encoder.qformer.word_embedding.weight.shape == (30523, 32)
    assert encoder.qformer.word_embedding.weight[30522].std().item() == pytest.approx(deviation, rel=0.4)
    assert encoder.qformer.query_tokens.shape == (1, 16, 32)
    assert torch.equal(encoder.qformer.query_tokens, initial_encoder(clip, bert).qformer.query_tokens)
    assert not torch.equal(encoder.qformer.query_tokens, initial_encoder(clip, bert, seed=1).qformer.query_tokens)


def test_the_command_writes_a_model_that_training_reads(clip, bert, stable_diffusion, tmp_path, capsys):
    folder = tmp_path / "first"
    assert main([str(clip), str(bert), str(stable_diffusion), str(folder)]) == 0
    assert capsys.readouterr().out == f"The model to begin with is in {folder}.\n"
    expected, found = initial_pipeline(clip, bert, stable_diffusion), load_pipeline(folder)
    for name, network in expected.networks.items():
        for key, weight in network.state_dict().items():
            assert torch.equal(found.networks[name].state_dict()[key], weight)


def test_folders_that_lack_something_get_one_sentence(clip, bert, stable_diffusion, tmp_path, capsys):
    assert main([str(clip), str(bert), str(bert), str(tmp_path / "a")]) == 1
    assert capsys.readouterr().err == f"{bert} has no text_encoder, unet, vae: choose a whole one.\n"
    assert main([str(tmp_path), str(bert), str(stable_diffusion), str(tmp_path / "a")]) == 1
    assert capsys.readouterr().err == f"{tmp_path} has no config.json: choose a folder in transformers' layout.\n"
    (tmp_path / "config.json").write_bytes((clip / "config.json").read_bytes())
    with pytest.raises(ValueError, match="has no weights: choose a folder in transformers' layout"):
        initial_encoder(tmp_path, bert)
    weights = load_file(clip / "model.safetensors")
    torch.save({k: v[:1] if k.endswith("pre_layrnorm.bias") else v for k, v in weights.items()}, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"does not fit its own config: vision.pre_norm.bias .* \[1\], .* \[32\]"):
        initial_encoder(tmp_path, bert)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 1_000_000}, "sets num_hidden_layers to 1000000, where a whole number from 1 to"),
        ({"hidden_size": "32"}, "sets hidden_size to '32', where a whole number"),
        ({"num_attention_heads": 5}, "a width of 32 cannot be shared by 5 heads"),
        ({"vocab_size": None}, "sets vocab_size to None"),
        ({"hidden_size": 16_384}, "sets hidden_size to 16384, where a whole number from 1 to 4096 is needed"),
        ({"hidden_size": 4_096}, "does not fit its own config: qformer.word_embedding.weight has the shape"),
        ({"num_hidden_layers": 3}, 'lacks "qformer.layers.2.'),
        ({"num_hidden_layers": 1}, "has more layers than its config tells"),
    ],
)
def test_a_config_that_is_not_its_weights_is_refused_before_anything_is_built(clip, bert, tmp_path, change, sentence):
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "pytorch_model.bin").symlink_to(bert / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\S") as refused:
        initial_encoder(clip, tmp_path)
    assert sentence in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("name", ["embeddings.class_embedding", "encoder.layers.1.self_attn.k_proj.bias"])
def test_a_clip_that_lacks_a_weight_is_named(clip, bert, tmp_path, name):
    (tmp_path / "config.json").write_bytes((clip / "config.json").read_bytes())
    weights = load_file(clip / "model.safetensors")
    del weights[f"vision_model.{name}"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks ") as refused:
        initial_encoder(tmp_path, bert)
    assert str(tmp_path) in str(refused.value)
