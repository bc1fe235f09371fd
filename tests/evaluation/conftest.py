"""An untrained model small enough to draw in no time."""

import pytest

from blip_qformer.training.parts import new_parts
from tools.host import comfyui_path


@pytest.fixture(scope="session")
def tiny_parts():
    parts = new_parts(
        {
            "tokenizer": str(comfyui_path() / "comfy" / "sd1_tokenizer"),
            "vision": {"image_size": 28, "width": 32, "layers": 1, "heads": 2, "feed_forward_width": 32},
            "qformer": {"width": 32, "layers": 1, "heads": 2, "feed_forward_width": 32, "text_positions": 16},
            "projection_width": 32,
            "text_encoder": {"width": 32, "layers": 1, "heads": 2, "feed_forward_width": 32},
            "unet": {
                "sample_size": 8,
                "block_out_channels": [32, 32],
                "layers_per_block": 1,
                "cross_attention_dim": 32,
                "attention_head_dim": 8,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            },
            "vae": {
                "latent_channels": 4,
                "block_out_channels": [32, 32, 32, 32],
                "layers_per_block": 1,
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
            },
        },
        seed=0,
    )
    for network in parts.networks.values():
        network.eval().requires_grad_(False)
    return parts
