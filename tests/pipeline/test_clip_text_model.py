"""Our text encoder against transformers' and against the reference with vectors among its words."""

from __future__ import annotations

import pytest
import torch
import transformers

from blip_qformer.pipeline.clip_text_model import CLIPTextModel, CLIPTextModelConfig, encode_prompts
from tests import oracle
from tools.host import comfyui_path

SIZES = oracle.Sizes(width=64, text_layers=3, text_heads=4)
TEXTS = ["a dog swimming underwater", "", "a teddy bear " + "in the snow, " * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return oracle.tokenizer(comfyui_path())


@pytest.fixture(scope="module")
def reference():
    """The reference's text model with random weights."""
    return oracle.text_encoder(SIZES)


@pytest.fixture(scope="module")
def ours(reference) -> CLIPTextModel:
    """Ours with the same weights, read by their published names."""
    encoder = CLIPTextModel(CLIPTextModelConfig.from_hub(reference.config.to_dict()))
    encoder.load_hub_state_dict(reference.state_dict())
    return encoder.eval()


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False).input_ids


def test_it_is_transformers_text_model(tokenizer):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
    )
    theirs = oracle.randomized(transformers.CLIPTextModel(config), seed=1)
    encoder = CLIPTextModel(CLIPTextModelConfig.from_hub(config.to_dict()))
    encoder.load_hub_state_dict(theirs.state_dict())
    padded = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    expected = theirs(padded).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder(encoder.embed(padded)), expected, atol=1e-5, rtol=0)
    found = encode_prompts(encoder, ids_of(tokenizer, TEXTS), [None] * len(TEXTS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_comes_later_changes_nothing_before(ours):
    embeddings = torch.randn(1, 77, 64)
    changed = embeddings.clone()
    changed[:, 40:] += torch.randn(1, 37, 64)
    before, after = ours(embeddings), ours(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.isclose(before[:, 40:], after[:, 40:]).all(dim=-1).any()


def test_vectors_among_the_words_are_the_references(reference, ours, tokenizer):
    """At every length of prompt, too long ones too: the reference reserves positions, we cut behind the vectors."""
    texts = ["a dog", *TEXTS[::2]]
    vectors = torch.randn(len(texts), 16, 64)
    short = tokenizer(
        texts, padding="max_length", truncation=True, max_length=77 - 16, return_tensors="pt"
    ).input_ids  # as the reference's encode_prompt does
    expected = reference(
        input_ids=short, ctx_embeddings=vectors, ctx_begin_pos=[2] * len(texts), return_dict=True
    ).last_hidden_state
    found = encode_prompts(ours, ids_of(tokenizer, texts), list(vectors))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_rows_with_and_without_a_subject_do_not_mix(ours, tokenizer):
    ids = ids_of(tokenizer, ["a dog", "a cat in the snow", "a dog"])
    vectors = torch.randn(16, 64)
    mixed = encode_prompts(ours, ids, [None, vectors, None])
    assert torch.equal(mixed[0], mixed[2])
    torch.testing.assert_close(mixed[1], encode_prompts(ours, ids[1:2], [vectors])[0])
    torch.testing.assert_close(mixed[0], encode_prompts(ours, ids[:1], [None])[0])


def test_gradients_reach_the_vectors_and_the_words(ours, tokenizer):
    ours.requires_grad_(True)
    vectors = torch.randn(16, 64, requires_grad=True)
    encode_prompts(ours, ids_of(tokenizer, ["a dog"]), [vectors]).square().sum().backward()
    assert (vectors.grad.abs().sum(dim=1) > 0).all()
    seen = ours.embeddings.token_embedding.weight.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert set(seen) == {49406, 49407, *ids_of(tokenizer, ["a dog"])[0]}
    ours.requires_grad_(False).zero_grad()


def test_the_config_comes_back(reference):
    config = CLIPTextModelConfig.from_hub(reference.config.to_dict())
    assert CLIPTextModelConfig.from_hub(config.to_hub()) == config
    assert CLIPTextModelConfig.from_hub({}) == CLIPTextModelConfig()  # a published config leaves out what is CLIP-L's
