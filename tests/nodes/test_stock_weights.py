"""What the host does to weights acts on our MODEL and CLIP as on those that its own loaders read from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import oracle

#: SD1.5's widths, by which the host knows it, with fewer levels.
SHALLOW = dataclasses.replace(oracle.FULL, unet_channels=(320, 640), unet_attention=(True, False), unet_layers=1)
LORA = "weights.safetensors"
UNET_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # [320, 768]
TEXT_LAYER = "lora_te_text_model_encoder_layers_0_mlp_fc1"  # [3072, 768]


def write(host, kind: str, name: str, tensors: dict[str, Tensor]) -> None:
    """Write a file where the stock loader of its kind lists it."""
    folder = host.base / "models" / kind
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / name)


def component(host, network, config):
    return host.module("blip_qformer.checkpoint").Component(Path("here"), config, network.state_dict)


@pytest.fixture(scope="module")
def models(host) -> list:
    """Our MODEL, and the stock Load Diffusion Model's of the same weights."""
    unet = oracle.unet(SHALLOW)
    networks = host.module("nodes.host.networks")
    ours = networks.build_model(component(host, unet, dict(unet.config)), component(host, unet, {}))
    write(host, "diffusion_models", "same.safetensors", ours.model.diffusion_model.state_dict())
    return [ours, *host.run("UNETLoader", unet_name="same.safetensors", weight_dtype="default")]


@pytest.fixture(scope="module")
def clips(host) -> list:
    """Our CLIP, and the stock Load CLIP's of the same weights."""
    network = oracle.text_encoder(oracle.FULL)
    ours = host.module("nodes.host.networks").build_clip(component(host, network, network.config.to_dict()))
    weights = ours.cond_stage_model.clip_l.transformer.state_dict()
    weights = {name: weight for name, weight in weights.items() if "text_projection" not in name}
    write(host, "text_encoders", "same.safetensors", weights)
    return [ours, *host.run("CLIPLoader", clip_name="same.safetensors", type="stable_diffusion")]


@pytest.fixture(scope="module", autouse=True)
def lora(host) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, outputs in ((UNET_LAYER, 320), (TEXT_LAYER, 3072)):
        tensors[f"{layer}.lora_down.weight"] = torch.randn(2, 768, generator=generator) / 8
        tensors[f"{layer}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator) / 8
    write(host, "loras", LORA, tensors)


def sampled(host, model, hooks=None) -> Tensor:
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0))
    positive, negative = [[context, {}]], [[0.5 * context, {}]]
    if hooks is not None:
        (positive,) = host.run("ConditioningSetProperties", cond_NEW=positive, hooks=hooks, strength=1.0)
    return host.run(
        "KSampler",
        model=model,
        seed=0,
        steps=1,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        positive=positive,
        negative=negative,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        denoise=1.0,
    )[0]["samples"]


def with_lora(host, model) -> Tensor:
    (patched,) = host.run("LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=1.0)
    return sampled(host, patched)


def with_hook(host, model) -> Tensor:
    (hooks,) = host.run("CreateHookLora", lora_name=LORA, strength_model=1.0, strength_clip=0.0)
    return sampled(host, model, hooks)


def merged(host, model) -> Tensor:
    """Halfway between the model and the model with the LoRA."""
    (patched,) = host.run("LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=1.0)
    return sampled(host, *host.run("ModelMergeSimple", model1=patched, model2=model, ratio=0.5))


@pytest.mark.parametrize("way", [with_lora, with_hook, merged])
def test_our_model_and_the_stock_loaders_are_patched_alike(host, models, way):
    plain = [sampled(host, model) for model in models]
    patched = [way(host, model) for model in models]
    assert torch.equal(*plain)
    assert torch.equal(*patched)
    assert (patched[0] - plain[0]).abs().max() > 1e-3
    assert torch.equal(sampled(host, models[0]), plain[0])


def test_half_of_a_lora_is_half_a_merge(host, models):
    (half,) = host.run("LoraLoaderModelOnly", model=models[0], lora_name=LORA, strength_model=0.5)
    torch.testing.assert_close(sampled(host, half), merged(host, models[0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("way", ["LoraLoader", "hook"])
def test_our_clip_and_the_stock_loaders_are_patched_alike(host, models, clips, way):
    def encoded(clip) -> Tensor:
        return host.run("CLIPTextEncode", clip=clip, text="a dog in the snow")[0][0][0]

    plain = [encoded(clip) for clip in clips]
    patched = []
    for clip in clips:
        if way == "LoraLoader":
            _, changed = host.run(
                "LoraLoader", model=models[0], clip=clip, lora_name=LORA, strength_model=0.0, strength_clip=1.0
            )
        else:
            (hooks,) = host.run("CreateHookLora", lora_name=LORA, strength_model=0.0, strength_clip=1.0)
            inputs = {"hooks": hooks, "apply_to_conds": True, "schedule_clip": False}
            (changed,) = host.run("SetClipHooks", clip=clip, **inputs)
        patched.append(encoded(changed))
    assert torch.equal(*plain)
    assert torch.equal(*patched)
    assert (patched[0] - plain[0]).abs().max() > 1e-3
    assert torch.equal(encoded(clips[0]), plain[0])
