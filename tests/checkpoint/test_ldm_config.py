"""The sizes of Stable Diffusion's networks, inferred from their weights."""

import pytest
import torch

from blip_qformer.checkpoint.ldm_config import departures_from_stock, text_encoder_config, unet_config, vae_config
from tests.checkpoint.networks import full_text_encoder, full_unet, full_vae, small_text_encoder, small_unet, small_vae


def test_a_model_of_another_size_is_said_not_to_suit_the_stock_loader():
    networks = small_unet("two levels"), small_text_encoder(), small_vae("three levels")
    assert departures_from_stock(*(network.state_dict() for network in networks)) == [
        "U-Net width 32 instead of 320",
        "U-Net context 64 instead of 768",
        "text encoder width 128 instead of 768",
        "text encoder layers 2 instead of 12",
        "VAE width 32 instead of 128",
        "VAE levels [1, 2, 2] instead of [1, 2, 4, 4]",
    ]
    full = full_unet(), full_text_encoder(), full_vae()
    assert departures_from_stock(*(network.state_dict() for network in full)) == []


@pytest.mark.parametrize("configure", [unet_config, vae_config, text_encoder_config])
def test_a_config_of_other_weights_says_which_tensor_it_looked_for(configure):
    with pytest.raises(ValueError, match=r"^The weights hold no \S+, which tells the model's size: use .*\.$"):
        configure({"x": torch.zeros(1)})


def test_a_level_that_is_no_multiple_of_the_first_comes_to_its_width():
    """The host multiplies from either side, and makes layers of what it gets."""
    weights = full_unet().state_dict()
    weights["down_blocks.1.resnets.0.conv1.weight"] = torch.empty(500, 320, 3, 3, device="meta")
    multiples = unet_config(weights)["channel_mult"]
    for widths in ([320 * each for each in multiples], [each * 320 for each in multiples]):
        assert widths == [320, 500, 1280, 1280]
        assert all(type(width) is int for width in widths)
