"""The LDM layout, against diffusers and transformers as the source and the real ComfyUI's classes as the reader."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from blip_qformer.checkpoint.ldm_config import (
    departures_from_stock,
    text_encoder_config,
    unet_config,
    vae_config,
)
from blip_qformer.checkpoint.ldm_keys import (
    check_depth,
    controlnet_to_ldm,
    stable_diffusion_checkpoint,
    text_encoder_to_ldm,
    unet_to_ldm,
    vae_to_ldm,
)
from blip_qformer.checkpoint.write_safetensors import write_safetensors
from tests.checkpoint.networks import (
    UNETS,
    VAES,
    full_text_encoder,
    full_unet,
    full_vae,
    small_controlnet,
    small_text_encoder,
    small_unet,
    small_vae,
)


def host_unet(config: dict, device: str = "cpu") -> torch.nn.Module:
    """The host's U-Net."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**config, device=device, operations=comfy.ops.disable_weight_init).eval()


def host_vae(config: dict) -> torch.nn.Module:
    """The host's VAE."""
    from comfy.ldm.models.autoencoder import AutoencoderKL as HostAutoencoder

    return HostAutoencoder(**config).eval()


def host_text_config(config: dict) -> dict:
    """The host's own CLIP-L configuration with these values over it, which is what its `clip_l_model_config` does."""
    import comfy.sd1_clip

    return json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text()) | config


def host_text_encoder(config: dict, device: str = "cpu") -> torch.nn.Module:
    """The host's CLIP text model."""
    import comfy.clip_model
    import comfy.ops

    return comfy.clip_model.CLIPTextModel(
        host_text_config(config), torch.float32, device, comfy.ops.disable_weight_init
    ).eval()


def text_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The converted text encoder by the names inside the host's class."""
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}


def shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("size", UNETS)
@torch.no_grad()
def test_a_converted_unet_predicts_the_same_in_the_host(host, size):
    source = small_unet(size)
    target = host_unet(unet_config(source.state_dict(), heads=4))
    target.load_state_dict(unet_to_ldm(source.state_dict()), strict=True)

    latent, steps, context = torch.randn(2, 4, 8, 12), torch.tensor([10.0, 900.0]), torch.randn(2, 7, 64)
    expected = source(latent, steps, context).sample
    torch.testing.assert_close(target(latent, steps, context), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", VAES)
@torch.no_grad()
def test_a_converted_vae_encodes_and_decodes_the_same_in_the_host(host, size):
    source = small_vae(size)
    target = host_vae(vae_config(source.state_dict()))
    target.load_state_dict(vae_to_ldm(source.state_dict()), strict=True)

    image, latent = torch.rand(2, 3, 16, 24), torch.randn(2, VAES[size]["latent_channels"], 8, 6)
    torch.testing.assert_close(target.encode(image), source.encode(image).latent_dist.mode(), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.decode(latent), source.decode(latent).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("axes", [2, 4])
def test_a_vae_with_its_attentions_old_names_converts_to_the_same(axes):
    weights = small_vae("three levels").state_dict()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in weights.items():
        for new_name, old_name in old_names.items():
            if f".{new_name}." in name:
                name = name.replace(new_name, old_name)
                tensor = tensor[:, :, None, None] if axes == 4 and tensor.ndim == 2 else tensor
        old[name] = tensor
    assert old.keys() != weights.keys()

    converted, expected = vae_to_ldm(old), vae_to_ldm(weights)
    assert shapes(converted) == shapes(expected)
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@torch.no_grad()
def test_a_converted_text_encoder_reads_the_same_in_the_host(host, prefix):
    source = small_text_encoder(layers=3)
    weights = {prefix + name.removeprefix("text_model."): tensor for name, tensor in source.state_dict().items()}
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    target = host_text_encoder(text_encoder_config(weights, heads=4))
    missing, unexpected = target.load_state_dict(text_weights(text_encoder_to_ldm(weights)), strict=False)
    assert missing == ["text_projection.weight"]  # in no SD1.5 checkpoint; it touches nothing but the projected pooled
    assert unexpected == []

    tokens = torch.randint(0, 49405, (2, 77))
    tokens[:, -1] = 49407
    expected = source(tokens).last_hidden_state
    torch.testing.assert_close(target(tokens)[0], expected, atol=1e-4, rtol=0)


def test_stable_diffusions_own_unet_gives_the_hosts_names_shapes_and_configuration(host):
    import comfy.model_detection

    weights = full_unet().state_dict()
    converted = unet_to_ldm(weights)
    assert len(converted) == 686
    assert shapes(converted) == shapes(host_unet(unet_config(weights), device="meta").state_dict())

    expected = comfy.model_detection.unet_config_from_diffusers_unet(weights)
    assert expected.pop("dtype") is None  # no shape tells it: the host sets it when it builds the model
    assert unet_config(weights) == expected
    assert type(comfy.model_detection.model_config_from_unet_config(unet_config(weights))).__name__ == "SD15"

    # And what the host reads off the converted names, as the stock checkpoint loader does.
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in converted.items()}
    detected = comfy.model_detection.detect_unet_config(prefixed, "model.diffusion_model.")
    assert detected.items() <= unet_config(weights).items()


def test_stable_diffusions_own_vae_gives_the_hosts_names_shapes_and_configuration(host):
    weights = full_vae().state_dict()
    config = vae_config(weights)
    assert config["ddconfig"]["ch"] == 128
    assert config["ddconfig"]["ch_mult"] == [1, 2, 4, 4]
    assert config["ddconfig"]["num_res_blocks"] == 2
    assert config["embed_dim"] == 4
    with torch.device("meta"):
        expected = host_vae(config).state_dict()
    converted = vae_to_ldm(weights)
    assert len(converted) == 248
    assert shapes(converted) == shapes(expected)


def test_clip_l_gives_the_hosts_names_shapes_and_configuration(host):
    weights = full_text_encoder().state_dict()
    config = text_encoder_config(weights)
    assert host_text_config(config) == host_text_config({})
    expected = shapes(host_text_encoder(config, device="meta").state_dict())
    del expected["text_projection.weight"]
    assert shapes(text_weights(text_encoder_to_ldm(weights))) == expected


def test_the_checkpoint_is_the_parts_under_the_stock_loaders_prefixes(host):
    import comfy.model_detection

    unet, text_encoder, vae = full_unet(), full_text_encoder(), full_vae()
    checkpoint = stable_diffusion_checkpoint(unet.state_dict(), text_encoder.state_dict(), vae.state_dict())
    assert "model.diffusion_model.output_blocks.11.1.proj_out.weight" in checkpoint
    assert "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias" in checkpoint
    assert "first_stage_model.decoder.up.3.upsample.conv.weight" in checkpoint
    assert len(checkpoint) == len(unet.state_dict()) + len(text_encoder.state_dict()) + len(vae.state_dict())

    prefix = comfy.model_detection.unet_prefix_from_state_dict(checkpoint)
    assert type(comfy.model_detection.model_config_from_unet(checkpoint, prefix)).__name__ == "SD15"


def test_the_stock_loader_takes_a_written_checkpoint_with_nothing_missing_or_left_over(host, tmp_path, caplog):
    import comfy.sd

    # The loader knows SD1.5 by a U-Net 320 wide; one level of it is enough. The other two must be of full size.
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=768,
        )
    networks = [numbered(model.state_dict()) for model in (unet, full_text_encoder(), full_vae())]
    assert departures_from_stock(*networks) == []
    checkpoint = stable_diffusion_checkpoint(*networks)
    path = tmp_path / "checkpoint.safetensors"
    write_safetensors(path, checkpoint, dtype=torch.float16, metadata={"format": "pt"})

    caplog.set_level(logging.DEBUG)
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    complaints = ("missing", "unexpected", "left over", "not loaded", "unet unexpected")
    assert [line for line in caplog.messages if any(words in line.lower() for words in complaints)] == [
        "clip missing: ['clip_l.logit_scale', 'clip_l.transformer.text_projection.weight']"  # in no SD1.5 file
    ]

    loaded = {
        "model.": model.model.state_dict(),
        "cond_stage_model.": clip.cond_stage_model.clip_l.state_dict(),
        "first_stage_model.": vae.first_stage_model.state_dict(),
    }
    for name, tensor in checkpoint.items():
        prefix = next(prefix for prefix in loaded if name.startswith(prefix))
        assert loaded[prefix][name.removeprefix(prefix)].flatten()[0] == tensor.flatten()[0].half()


def numbered(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes, each full of a number of its own, in the memory of that number."""
    return {
        name: torch.tensor(number / 1024).expand(tensor.shape)
        for number, (name, tensor) in enumerate(weights.items(), start=1)
    }


def test_conversion_shares_the_tensors_memory():
    source = small_vae("three levels").state_dict()
    addresses = {tensor.data_ptr() for tensor in source.values()}
    assert {tensor.data_ptr() for tensor in vae_to_ldm(source).values()} == addresses
    source = small_unet("two levels").state_dict()
    addresses = {tensor.data_ptr() for tensor in source.values()}
    assert {tensor.data_ptr() for tensor in unet_to_ldm(source).values()} == addresses


CONVERSIONS = {
    "U-Net": (unet_to_ldm, lambda: small_unet("two levels")),
    "VAE": (vae_to_ldm, lambda: small_vae("three levels")),
    "text encoder": (text_encoder_to_ldm, small_text_encoder),
    "ControlNet": (controlnet_to_ldm, small_controlnet),
}


@pytest.mark.parametrize("network", CONVERSIONS)
def test_unknown_tensors_are_named_up_to_five(network):
    convert, source = CONVERSIONS[network]
    weights = source().state_dict() | {f"stranger.{number}.weight": torch.zeros(1) for number in range(7)}
    with pytest.raises(ValueError, match="has no place for") as raised:
        convert(weights)
    assert str(raised.value) == (
        f'The {network} holds tensors that Stable Diffusion 1.5 has no place for ("stranger.0.weight", '
        '"stranger.1.weight", "stranger.2.weight", "stranger.3.weight", "stranger.4.weight" and 2 more): use weights '
        "of that architecture, in diffusers' names."
    )


@pytest.mark.parametrize("network", CONVERSIONS)
def test_every_missing_tensor_is_named(network):
    """Weight or bias: what the host's classes do not get stays random memory."""
    convert, source = CONVERSIONS[network]
    whole = {name: tensor for name, tensor in source().state_dict().items() if not name.endswith("position_ids")}
    for lost in whole:
        weights = {name: tensor for name, tensor in whole.items() if name != lost}
        with pytest.raises(ValueError, match=re.escape(lost.removeprefix("text_model."))):
            convert(weights)


@pytest.mark.parametrize("network", CONVERSIONS)
def test_missing_levels_are_told_by_the_config(network):
    _, source = CONVERSIONS[network]
    model = source()
    name = {"U-Net": "unet", "VAE": "vae", "text encoder": "text_encoder", "ControlNet": "controlnet"}[network]
    config = model.config.to_dict() if network == "text encoder" else dict(model.config)
    check_depth(name, model.state_dict(), config)
    check_depth(name, model.state_dict(), {})  # nothing to hold it against
    layer = {"text encoder": "encoder.layers.1.", "VAE": "decoder.up_blocks.2."}.get(network, "down_blocks.1.")
    rest = {key: tensor for key, tensor in model.state_dict().items() if layer not in key}
    with pytest.raises(ValueError, match=r"holds \d \S+ and its config tells of \d: download its file again"):
        check_depth(name, rest, config)
