"""Subject Prompt Compose: what stays stock ComfyUI, and what the subject adds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file


def compose(host, loaded, subject, clip=None, **inputs):
    inputs = {"prompt": "in the snow", "repetitions": 1, **inputs}
    return host.run("BLIPDiffusionPromptCompose", clip=clip or loaded.clip, subject=subject, **inputs)


def stock(host, clip, text):
    return host.run("CLIPTextEncode", clip=clip, text=text)[0]


def spans(conditioning):
    return {span.word: span.positions for span in conditioning[0][1]["blip_token_spans"]}


@pytest.mark.parametrize("prompt", ["in the snow", "a (red:1.3) hat " * 20, ", ".join(["(so:0.9) many words"] * 60)])
def test_strength_0_is_the_plain_prompt(host, loaded, subject, prompt):
    conditioning, text = compose(host, loaded, subject, prompt=prompt, subject_strength=0.0, overflow="continue")
    assert (conditioning[0][0] - stock(host, loaded.clip, text)[0][0]).abs().max() == 0.0
    cut, _ = compose(host, loaded, subject, prompt=prompt, subject_strength=0.0, overflow="truncate")
    assert cut[0][0].shape[1] == 77
    if "(" not in prompt:  # with weights, the host compares with an empty prompt as long as all blocks together
        assert (cut[0][0] - conditioning[0][0][:, :77]).abs().max() == 0.0


def test_strength_is_the_hosts_token_weight(host, loaded, subject):
    """(with - empty) * strength + empty on the sixteen positions, and nothing elsewhere."""
    full = compose(host, loaded, subject)[0][0][0]
    half = compose(host, loaded, subject, subject_strength=0.5)[0][0][0]
    empty = stock(host, loaded.clip, "")[0][0]
    expected = full.clone()
    expected[:, 2:18] = (full[:, 2:18] + empty[:, 2:18]) / 2
    torch.testing.assert_close(half, expected, atol=1e-5, rtol=0)


def test_target_replaces_the_word(host, loaded, subject):
    assert compose(host, loaded, subject, target_subject=" teapot ")[1] == "a teapot in the snow"
    assert compose(host, loaded, subject)[1] == "a dog in the snow"


def test_word_weights_keep_working(host, loaded, subject):
    plain = compose(host, loaded, subject, prompt="in the snow")[0][0][0]
    weighted = compose(host, loaded, subject, prompt="in the (snow:1.5)")[0][0][0]
    changed = (plain - weighted).abs().amax(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == list(spans(compose(host, loaded, subject)[0])["snow"])


def test_textual_inversions_keep_working(host, loaded, subject):
    width = subject.vectors.shape[-1]
    save_file({"emb_params": torch.randn(2, width)}, host.base / "models" / "embeddings" / "sparkle.safetensors")
    with_embedding, _ = compose(host, loaded, subject, prompt="in embedding:sparkle snow")
    positions = [span.positions for span in with_embedding[0][1]["blip_token_spans"] if span.word == "<embedding>"]
    assert positions == [(20, 21)]  # <bos> a, sixteen, dog in
    assert not torch.equal(with_embedding[0][0], compose(host, loaded, subject, prompt="in snow")[0][0][0])


def test_a_patched_clip_keeps_working(host, loaded, subject):
    """What a LoRA does to a CLIP: patch its weights."""
    patched = loaded.clip.clone()
    weight = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    shape = patched.cond_stage_model.state_dict()[weight].shape
    patched.add_patches({weight: ("diff", (torch.randn(shape),))}, 1.0)
    assert not torch.equal(
        compose(host, loaded, subject, clip=patched)[0][0][0], compose(host, loaded, subject)[0][0][0]
    )


def test_clip_skip_keeps_working(host, loaded, subject):
    (skipping,) = host.run("CLIPSetLastLayer", clip=loaded.clip, stop_at_clip_layer=-2)
    assert not torch.equal(
        compose(host, loaded, subject, clip=skipping)[0][0][0], compose(host, loaded, subject)[0][0][0]
    )


def test_long_prompts_are_cut_or_continued(host, loaded, subject):
    long = {"prompt": "word " * 500}
    cut, _ = compose(host, loaded, subject, **long)
    continued, _ = compose(host, loaded, subject, overflow="continue", **long)
    assert cut[0][0].shape[1] == 77
    assert continued[0][0].shape[1] == 77 * 7  # 16 + 502 tokens, 75 to a block
    torch.testing.assert_close(continued[0][0][:, :77], cut[0][0], atol=1e-5, rtol=0)


def test_an_empty_prompt_is_the_subject_alone(host, loaded, subject):
    conditioning, text = compose(host, loaded, subject, prompt="")
    assert text == "a dog "
    assert list(spans(conditioning)) == ["a", "<subject>", "dog"]


def test_a_batch_of_subjects_is_a_batch_of_rows(host, loaded):
    subjects, _ = host.run(
        "BLIPDiffusionSubjectEncode",
        qformer=loaded.qformer,
        image=torch.rand(3, 40, 40, 3),
        subject_word="dog",
        average_batch=False,
    )
    conditioning, _ = compose(host, loaded, subjects)
    assert conditioning[0][0].shape[:2] == (3, 77)
    for row, vectors in zip(conditioning[0][0], subjects.vectors, strict=True):
        alone, _ = compose(host, loaded, type(subjects)(vectors[None], "dog"))
        torch.testing.assert_close(row, alone[0][0][0], atol=1e-5, rtol=0)
    assert conditioning[0][1]["pooled_output"].shape[0] == 3


def test_each_row_draws_its_own_picture(host, loaded):
    """Row by row: two subjects in one run give what each gives alone, from the same noise."""
    subjects, _ = host.run(
        "BLIPDiffusionSubjectEncode",
        qformer=loaded.qformer,
        image=torch.rand(2, 40, 40, 3),
        subject_word="dog",
        average_batch=False,
    )
    negative = stock(host, loaded.clip, "")

    def sample(subject, rows):
        latent = {"samples": torch.zeros(rows, 4, 8, 8), "batch_index": [0] * rows}
        return host.run(
            "KSampler",
            model=loaded.model,
            seed=3,
            steps=3,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            positive=compose(host, loaded, subject)[0],
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )[0]["samples"]

    both = sample(subjects, 2)
    alone = torch.cat([sample(type(subjects)(vectors[None], "dog"), 1) for vectors in subjects.vectors])
    assert not torch.allclose(both[0], both[1])
    torch.testing.assert_close(both, alone, atol=1e-3 * alone.std().item(), rtol=0)


def test_words_are_found_in_the_conditioning(host, loaded, subject):
    conditioning, _ = compose(host, loaded, subject, prompt="wearing a top hat underwater", target_subject="teddy bear")
    found = [(span.word, span.positions) for span in conditioning[0][1]["blip_token_spans"]]
    assert found[:3] == [("a", (1,)), ("<subject>", tuple(range(2, 18))), ("teddy", (18,))]
    assert [word for word, _ in found[2:]] == ["teddy", "bear", "wearing", "a", "top", "hat", "underwater"]


def test_words_in_further_blocks_are_found(host, loaded, subject):
    conditioning, _ = compose(host, loaded, subject, prompt="word " * 80 + "end", overflow="continue")
    assert spans(conditioning)["end"] == (77 + 1 + (1 + 16 + 1 + 80) - 75,)


@pytest.mark.parametrize(
    ("encoders", "named"),
    [(("g", "l"), "CLIP-G \\+ CLIP-L"), (("h",), "CLIP-H"), (("l", "t5xxl"), "CLIP-L \\+ T5-XXL")],
)
def test_other_clips_are_named(host, loaded, subject, encoders, named):
    other = SimpleNamespace(tokenize=lambda text: dict.fromkeys(encoders, [[]]))
    with pytest.raises(ValueError, match=f"This CLIP is {named}, but .* CLIP-L, the text encoder of SD1.5"):
        compose(host, loaded, subject, clip=other)


def test_an_embedding_of_another_width_is_left_out(host, loaded, subject, caplog):
    save_file({"emb_params": torch.randn(2, 1024)}, host.base / "models" / "embeddings" / "sd2.safetensors")
    conditioning, _ = compose(host, loaded, subject, prompt="in embedding:sd2 snow")
    without, _ = compose(host, loaded, subject, prompt="in snow")
    assert "An embedding of width 1024 was left out: this CLIP reads 128." in caplog.text
    assert spans(conditioning) == spans(without)
    torch.testing.assert_close(conditioning[0][0], without[0][0], atol=1e-5, rtol=0)


def test_a_checkpoint_without_a_text_encoder_is_named(host, loaded, subject):
    with pytest.raises(ValueError, match="The clip input is empty"):
        host.run("BLIPDiffusionPromptCompose", clip=None, subject=subject)


def test_another_width_is_named(host, loaded, subject):
    wide = type(subject)(torch.zeros(1, 16, 768), "dog")
    with pytest.raises(ValueError, match="words are 128 numbers wide and the subject's vectors 768"):
        compose(host, loaded, wide)
