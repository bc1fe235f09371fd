"""The reference implementation (diffusers' BLIP-Diffusion) at any size, with random weights: what ours is held to."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from diffusers.pipelines.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
from diffusers.pipelines.blip_diffusion.pipeline_blip_diffusion import BlipDiffusionPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer
from transformers.models.blip_2.configuration_blip_2 import Blip2Config

from blip_qformer.encoder.tokenizer import VOCABULARY


@dataclass(frozen=True)
class Sizes:
    """How large the random model is; the defaults are small enough for a test to take seconds."""

    image_size: int = 56
    vision_width: int = 128
    vision_layers: int = 3
    vision_heads: int = 2
    width: int = 64  # of Q-Former and text encoder: the vectors are words for it
    qformer_layers: int = 2
    qformer_heads: int = 1
    text_layers: int = 2
    text_heads: int = 4
    unet_channels: tuple[int, ...] = (32, 64)
    unet_attention: tuple[bool, ...] = (True, False)
    unet_layers: int = 1
    vae_channels: tuple[int, ...] = (32, 32, 64, 64)


#: Tables of vectors, which are looked up and not multiplied with.
TABLE = re.compile(r"(token|word|position|class)_embeddings?(\.weight)?$|query_tokens$")

SMALL = Sizes()
FULL = Sizes(
    image_size=224,
    vision_width=1024,
    vision_layers=23,
    vision_heads=16,
    width=768,
    qformer_layers=12,
    qformer_heads=12,
    text_layers=12,
    text_heads=12,
    unet_channels=(320, 640, 1280, 1280),
    unet_attention=(True, True, True, False),
    unet_layers=2,
    vae_channels=(128, 256, 512, 512),
)


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Models made inside have no initial weights: :func:`randomized` gives them others, and making them takes long."""

    def unchanged(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return tensor

    with patch.multiple(torch.Tensor, normal_=unchanged, uniform_=unchanged):
        yield


@_uninitialised()
def qformer(sizes: Sizes, folder: Path, seed: int = 0) -> Blip2QFormerModel:
    """The reference's subject encoder. ``folder`` takes its tokenizer's vocabulary, else it would ask the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(VOCABULARY, folder / "vocab.txt")
    config = Blip2Config(
        vision_config={
            "hidden_size": sizes.vision_width,
            "intermediate_size": 4 * sizes.vision_width,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "image_size": sizes.image_size,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        qformer_config={
            "vocab_size": 30523,
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.qformer_layers,
            "num_attention_heads": sizes.qformer_heads,
            "intermediate_size": 4 * sizes.width,
            "encoder_hidden_size": sizes.vision_width,
            "cross_attention_frequency": 1,
        },
        num_query_tokens=16,
        tokenizer=str(folder),
    )
    return randomized(Blip2QFormerModel(config), seed)


@_uninitialised()
def text_encoder(sizes: Sizes, seed: int = 1) -> ContextCLIPTextModel:
    """The reference's CLIP text model that takes vectors in the middle of its words."""
    config = CLIPTextConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        vocab_size=49408,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return randomized(ContextCLIPTextModel(config), seed)


@_uninitialised()
def unet(sizes: Sizes, seed: int = 2) -> UNet2DConditionModel:
    """A U-Net of SD1.5's kind."""
    down = [("CrossAttnDownBlock2D" if attention else "DownBlock2D") for attention in sizes.unet_attention]
    up = [("CrossAttnUpBlock2D" if attention else "UpBlock2D") for attention in reversed(sizes.unet_attention)]
    model = UNet2DConditionModel(
        block_out_channels=sizes.unet_channels,
        layers_per_block=sizes.unet_layers,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=sizes.width,
        attention_head_dim=8,
        sample_size=64,
    )
    return randomized(model, seed)


@_uninitialised()
def controlnet(sizes: Sizes, seed: int = 9) -> ControlNetModel:
    """A ControlNet that fits the U-Net."""
    model = ControlNetModel(
        block_out_channels=sizes.unet_channels,
        layers_per_block=sizes.unet_layers,
        down_block_types=[("CrossAttnDownBlock2D" if each else "DownBlock2D") for each in sizes.unet_attention],
        cross_attention_dim=sizes.width,
        attention_head_dim=8,
    )
    return randomized(model, seed)


@_uninitialised()
def vae(sizes: Sizes, seed: int = 3) -> AutoencoderKL:
    """A VAE of SD1.5's kind."""
    levels = len(sizes.vae_channels)
    model = AutoencoderKL(
        block_out_channels=sizes.vae_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2 if levels == 4 else 1,
        latent_channels=4,
    )
    return randomized(model, seed)


def tokenizer(host: Path) -> CLIPTokenizer:
    """CLIP's tokenizer; the host ships its vocabulary."""
    return CLIPTokenizer.from_pretrained(host / "comfy" / "sd1_tokenizer")


def pipeline(sizes: Sizes, folder: Path, host: Path, seed: int = 0) -> BlipDiffusionPipeline:
    """The whole reference pipeline."""
    return BlipDiffusionPipeline(
        tokenizer=tokenizer(host),
        text_encoder=text_encoder(sizes, seed + 1),
        vae=vae(sizes, seed + 2),
        unet=unet(sizes, seed + 3),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        qformer=qformer(sizes, folder / "bert", seed),
        image_processor=BlipImageProcessor(size={"height": sizes.image_size, "width": sizes.image_size}),
    )


def ddim(
    pipeline: BlipDiffusionPipeline,
    noise: torch.Tensor,
    prompt: torch.Tensor,
    negative: str,
    steps: int,
    guidance: float,
    controlnet: ControlNetModel | None = None,
    hint: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference pipelines' loop, with a scheduler that visits the timesteps of the host's ddim_uniform.

    Args:
        noise: [1, 4, H / 8, W / 8]; ``prompt``: [1, 77, width] from ``encode_prompt``.
        steps: a divisor of 1000, so that both count time alike.
        controlnet, hint: a ControlNet and its picture [1, 3, H, W] in 0..1.
    Returns:
        Latents, in diffusers' scale.
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,  # the host's last step ends at sigma 0
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    # The host starts an empty latent as sigma * noise; in diffusers' variables that is sqrt(1 - alpha) * noise.
    latents = (1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt() * noise
    tokens = pipeline.tokenizer([negative], padding="max_length", max_length=77, return_tensors="pt")
    context = torch.cat([pipeline.text_encoder(input_ids=tokens.input_ids)[0], prompt])
    for timestep in scheduler.timesteps:
        both = latents.repeat(2, 1, 1, 1)
        residuals = {}
        if controlnet is not None:
            down, middle = controlnet(both, timestep, context, hint.repeat(2, 1, 1, 1), return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        without, with_prompt = pipeline.unet(both, timestep, context, **residuals).sample.chunk(2)
        latents = scheduler.step(without + guidance * (with_prompt - without), timestep, latents).prev_sample
    return latents


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Give every weight a random value of a size at which signals neither die nor explode; evaluation mode.

    The classes' own initialisation will not do: it leaves the vision transformer's weights at nearly zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:  # biases are small, and a norm's scale lies around one
                is_scale = "norm" in name.lower() and name.endswith("weight")
                weight.copy_(noise * 0.1 + (1.0 if is_scale else 0.0))
            elif TABLE.search(name):
                weight.copy_(noise * 0.5)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)
