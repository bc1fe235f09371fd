"""Models other than plain SD1.5 at every node that takes a MODEL or edits a run: they work, or are refused at once.

A U-Net that reads more than the noisy latent, as for inpainting, gets the rest from the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.nodes import kinds
from tests.nodes.test_prompt import compose

STEPS = 3

#: Those whose U-Net is SD1.5's apart from its first layer.
SD15 = ("inpainting", "InstructPix2Pix")
UNETS = (*SD15, "SD2", "SDXL")
FLOW = ("SD3",)
CONFIGS = {kind: name for kind, (name, _) in kinds.KINDS.items()}


@pytest.fixture(scope="module")
def models(host, loaded) -> dict[str, Any]:
    """A small random model of each kind, for the conditionings of the loaded CLIP."""
    width = loaded.qformer.encoder.config.qformer.width
    return {kind: kinds.build(kind, width, width) for kind in kinds.KINDS}


def sample(host, model, positive, negative, latent) -> torch.Tensor:
    """Sample as the stock KSampler does."""
    return host.ddim(model, positive, negative, latent, STEPS, 5.0, 3)["samples"]


@pytest.fixture
def prompts(host, loaded, subject) -> list[list]:
    """Two prompts of one subject, and a negative one."""
    texts = ("in the snow", "in the rain")
    conditionings = [compose(host, loaded, subject, prompt=text)[0] for text in texts]
    return [*conditionings, host.run("CLIPTextEncode", clip=loaded.clip, text="")[0]]


@pytest.fixture
def latent() -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(1, 4, 8, 8)}


def edit(host, node, prompts, latent, **inputs) -> tuple[Any, Any, Any]:
    """Conditioning, latent and MODEL of a node that edits or records a run."""
    source, edited, _ = prompts
    if node == "BLIPDiffusionPromptToPrompt":
        return host.run(node, source=source, edited=edited, latent=latent, **inputs)
    weights = {"weights": "snow:2"} if node == "BLIPDiffusionAttentionReweight" else {}
    conditioning, *_, model = host.run(node, conditioning=source, **weights, **inputs)
    return conditioning, latent, model


@pytest.mark.parametrize("kind", SD15)
def test_words_are_reweighted(host, models, kind, prompts, latent):
    prompt, _, negative = prompts
    plain = sample(host, models[kind], prompt, negative, latent)
    same, without = (
        sample(
            host,
            models[kind],
            host.run("BLIPDiffusionAttentionReweight", conditioning=prompt, weights=f"snow:{weight}")[0],
            negative,
            latent,
        )
        for weight in (1, 0)
    )
    torch.testing.assert_close(same, plain, atol=1e-3, rtol=0)
    assert not torch.allclose(without, plain, atol=1e-2)


@pytest.mark.parametrize("kind", SD15)
def test_the_source_of_an_edit_is_sampled_as_it_is_alone(host, models, kind, prompts, latent):
    source, edited, negative = prompts
    conditioning, both, *_ = host.run("BLIPDiffusionPromptToPrompt", source=source, edited=edited, latent=latent)
    rows = sample(host, models[kind], conditioning, negative, both)
    assert len(rows) == 2
    alone = sample(host, models[kind], source, negative, latent)
    torch.testing.assert_close(rows[:1], alone, atol=1e-3, rtol=0)
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


@pytest.mark.parametrize("kind", UNETS)
def test_attention_is_recorded_and_the_image_stays(host, models, kind, prompts, latent):
    prompt, _, negative = prompts
    plain = sample(host, models[kind], prompt, negative, latent)
    hooked, record, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=prompt)
    torch.testing.assert_close(sample(host, models[kind], hooked, negative, latent), plain, atol=1e-3, rtol=0)
    image = torch.rand(1, 64, 64, 3)
    _, by_hook = host.run("BLIPDiffusionAttentionMap", attention=record, image=image)
    assert by_hook.max() > by_hook.min()
    wired, record, model = host.run("BLIPDiffusionAttentionRecord", conditioning=prompt, model=models[kind])
    torch.testing.assert_close(sample(host, model, wired, negative, latent), plain, atol=1e-3, rtol=0)
    _, by_wire = host.run("BLIPDiffusionAttentionMap", attention=record, image=image)
    torch.testing.assert_close(by_wire, by_hook)


@pytest.mark.parametrize("kind", UNETS)
def test_an_inverted_image_comes_back(host, models, kind, prompts):
    prompt, *_ = prompts
    coarse = torch.randn(1, 4, 3, 3, generator=torch.manual_seed(0))
    image = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bicubic")
    latent = {"samples": models[kind].model.latent_format.process_out(image)}
    inputs = {"model": models[kind], "conditioning": prompt, "latent": latent}
    inverted, _ = host.run("BLIPDiffusionDDIMInversion", **inputs, steps=20, refinements=5)
    (found,) = host.run(
        "KSamplerAdvanced",
        model=models[kind],
        positive=prompt,
        negative=prompt,
        latent_image=inverted,
        add_noise="disable",
        steps=20,
        cfg=1.0,
        sampler_name="ddim",
        scheduler="ddim_uniform",
    )
    difference = (found["samples"] - latent["samples"]).std() / latent["samples"].std()
    assert difference < 0.05


@pytest.mark.parametrize("kind", FLOW)
def test_inverting_a_flow_model_is_refused_before_any_work(host, models, kind, prompts, latent, monkeypatch):
    forbid_work(monkeypatch, models[kind])
    inputs = {"model": models[kind], "conditioning": prompts[0], "latent": {"samples": torch.rand(1, 16, 8, 8)}}
    with pytest.raises(ValueError, match="of the kind SD3, whose sampling throws the latent away.*: use SD1.5"):
        host.run("BLIPDiffusionDDIMInversion", **inputs)


@pytest.mark.parametrize("node", ["BLIPDiffusionAttentionReweight", "BLIPDiffusionPromptToPrompt"])
@pytest.mark.parametrize("kind", ["SD2", "SDXL", *FLOW])
def test_edits_refuse_other_models_before_any_work(host, models, node, kind, prompts, latent, monkeypatch):
    forbid_work(monkeypatch, models[kind])
    edits = "Attention Re-weight Edit, Prompt-to-Prompt Edit and Subject Regions"
    sentence = f"This model is {CONFIGS[kind]}, but {edits} work on SD1.5"
    with pytest.raises(ValueError, match=sentence):
        edit(host, node, prompts, latent, model=models[kind])
    conditioning, latents, _ = edit(host, node, prompts, latent)
    if kind in FLOW:
        latents = {"samples": torch.zeros(len(latents["samples"]), 16, 8, 8)}
    with pytest.raises(ValueError, match=sentence):
        sample(host, models[kind], conditioning, prompts[-1], latents)


@pytest.mark.parametrize("kind", FLOW)
def test_recording_a_model_without_cross_attention_is_refused(host, models, kind, prompts, monkeypatch):
    forbid_work(monkeypatch, models[kind])
    sentence = "of the kind SD3, in which words are not looked at through cross-attention: use an SD1.5 model"
    with pytest.raises(ValueError, match=sentence):
        host.run("BLIPDiffusionAttentionRecord", conditioning=prompts[0], model=models[kind])
    recorded, *_ = host.run("BLIPDiffusionAttentionRecord", conditioning=prompts[0])
    with pytest.raises(ValueError, match=sentence):
        sample(host, models[kind], recorded, prompts[-1], {"samples": torch.zeros(1, 16, 8, 8)})


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_fine_tuning_is_refused_before_any_work(host, models, loaded, kind, monkeypatch):
    forbid_work(monkeypatch, models[kind])
    monkeypatch.setattr(type(loaded.qformer), "encode", lambda *_: pytest.fail("an image was encoded"))
    monkeypatch.setattr(type(loaded.vae), "encode", lambda *_: pytest.fail("an image was encoded"))
    channels = kinds.KINDS[kind][1]["in_channels"]
    sentence = f"reads {channels} channels, as inpainting" if kind in SD15 else f"This model is {CONFIGS[kind]}, but"
    with pytest.raises(ValueError, match=f"{sentence} .*: connect a plain SD1.5 model"):
        finetune(host, loaded, model=models[kind])


def test_fine_tuning_refuses_another_vae_and_clip_before_any_work(host, loaded, monkeypatch):
    forbid_work(monkeypatch, loaded.model)
    monkeypatch.setattr(type(loaded.qformer), "encode", lambda *_: pytest.fail("an image was encoded"))
    with monkeypatch.context() as patch:
        patch.setattr(loaded.vae, "latent_channels", 16)
        with pytest.raises(ValueError, match="VAE's latents have 16 channels and this model reads 4: connect the VAE"):
            finetune(host, loaded)
    with pytest.raises(ValueError, match="The clip input is empty, .*: connect the CLIP"):
        finetune(host, loaded, clip=None)


def finetune(host, loaded, **changes) -> None:
    """Run Subject Fine-tune on one picture."""
    sockets = {"model": loaded.model, "clip": loaded.clip, "vae": loaded.vae, "qformer": loaded.qformer}
    inputs = {**sockets, "image": torch.rand(1, 64, 64, 3), "subject_word": "dog", "steps": 1, **changes}
    host.run("BLIPDiffusionSubjectFinetune", **inputs)


def forbid_work(monkeypatch, model) -> None:
    """Fail the test as soon as the model is run."""
    monkeypatch.setattr(model.model, "apply_model", lambda *_, **__: pytest.fail("the model was run"))
