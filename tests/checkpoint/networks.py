"""Networks of diffusers and transformers: small ones with random weights, and SD1.5's without memory for theirs."""

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

# Sizes that differ in all that the walk counts: levels, resnets in a level, where attention is, how deep it is.
UNETS = {
    "two levels": dict(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
    ),
    "three levels, attention in the middle one": dict(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=(1, 2, 3),
    ),
    "linear projections, two transformer blocks": dict(
        block_out_channels=(32, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=2,
        use_linear_projection=True,
    ),
}


VAES = {
    "one level": dict(block_out_channels=(32,), layers_per_block=1, latent_channels=4),
    "three levels": dict(block_out_channels=(32, 64, 64), layers_per_block=2, latent_channels=4),
    "eight latent channels": dict(block_out_channels=(32, 64), layers_per_block=3, latent_channels=8),
}


def small_unet(size: str) -> UNet2DConditionModel:
    """A random U-Net, every weight and bias of it, with 4 heads and a context of 64."""
    model = UNet2DConditionModel(**UNETS[size], cross_attention_dim=64, attention_head_dim=4, sample_size=8)
    return shaken(model)


def small_vae(size: str) -> AutoencoderKL:
    """A random VAE with as many levels as the size has widths."""
    levels = len(VAES[size]["block_out_channels"])
    return shaken(
        AutoencoderKL(
            **VAES[size],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            sample_size=16,
        )
    )


def small_text_encoder(layers: int = 2) -> CLIPTextModel:
    """A random CLIP text model. The host reads no vocabulary size, so it is CLIP's own."""
    config = CLIPTextConfig(hidden_size=128, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4)
    return shaken(CLIPTextModel(config))


def small_controlnet() -> ControlNetModel:
    return ControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with nothing left at its initial 0 or 1, so that no two of its tensors could be exchanged unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def full_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's U-Net, without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def full_vae() -> AutoencoderKL:
    """Stable Diffusion 1.5's VAE, without memory for its weights."""
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )


def full_text_encoder() -> CLIPTextModel:
    """CLIP-L's text model, without memory for its weights."""
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        return CLIPTextModel(config)
