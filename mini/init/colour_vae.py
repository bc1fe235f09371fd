"""First weights of a VAE: it begins as a picture made eight times smaller and larger again, and learns the rest.

From random weights a small VAE takes thousands of steps to find out what colour is, because its group norms take away
a group's mean and scale: of a group of one or two channels nothing is left. Here every group holds a colour, its
negative and a constant, from which colour and brightness can be told after the norm, and each layer hands them on.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

COLOURS = 4  # as many as there are channels in a latent; the fourth is free for what the encoder makes of it


CONSTANT = 4.0  # beside colours in -1..1: so much larger that a group's scale hardly depends on them


DEVIATION = 0.05  # how much of the random weights stays beside what is carried


LOG_VARIANCE = -7.0  # of the latents: random weights would begin with as much noise as signal


HALVE = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 4  # diffusers pads right and below


SMOOTH = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


@torch.no_grad()
def carry_colours(vae: AutoencoderKL) -> None:
    """Turn random weights, in place, into those of a VAE whose latents are the small picture's red, green and blue.

    It holds for 96 channels or more where a picture is given out; with fewer a group has no room for its constant, and
    what the decoder gives out is only roughly the picture.
    """
    groups = vae.config.norm_num_groups
    for name, module in vae.named_modules():
        if name.endswith("conv2"):  # the last of a residual block, which begins as almost nothing
            module.weight.mul_(DEVIATION / 2)
            module.bias.zero_()
        if name.endswith("to_out.0"):  # of the attention
            module.weight.zero_()
            module.bias.zero_()
        if name.endswith("conv1"):
            module.bias.copy_(1 - 2 * (torch.arange(len(module.bias)) % 2))
    for network in (vae.encoder, vae.decoder):
        _carry(network.conv_in, _plain(network.conv_in.in_channels), _grouped(network.conv_in.out_channels, groups))
        for block in network.down_blocks if network is vae.encoder else network.up_blocks:
            _carry_through(block, groups)
        _carry_out(network.conv_norm_out, network.conv_out, groups)
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        if convolution is not None:
            _carry(convolution, torch.eye(convolution.in_channels), torch.eye(convolution.out_channels))
    vae.quant_conv.bias[vae.config.latent_channels :] = LOG_VARIANCE


def _carry_through(block: nn.Module, groups: int) -> None:
    for resnet in block.resnets:
        if resnet.conv_shortcut is not None:
            _carry_on(resnet.conv_shortcut, groups)
    for sampler in getattr(block, "downsamplers", None) or []:
        _carry_on(sampler.conv, groups, HALVE)
    for sampler in getattr(block, "upsamplers", None) or []:
        _carry_on(sampler.conv, groups, SMOOTH)


def _carry_on(convolution: nn.Conv2d, groups: int, kernel: Tensor | None = None) -> None:
    codes = (_grouped(channels, groups) for channels in (convolution.in_channels, convolution.out_channels))
    _carry(convolution, *codes, kernel)


def _carry_out(norm: nn.GroupNorm, convolution: nn.Conv2d, groups: int) -> None:
    """A colour and its negative, normed, through SiLU: silu(a) - silu(-a) = a, once the norm's mean is given back."""
    read = _grouped(convolution.in_channels, groups)
    _carry(convolution, read, _plain(convolution.out_channels))
    convolution.bias.zero_()
    if (constant := _constants(read)).any():
        share = float(constant.float().mean())
        deviation = CONSTANT * (share * (1 - share)) ** 0.5  # of a group that holds its constant and no colour
        convolution.weight.mul_(2 * deviation)
        norm.bias[~constant] = CONSTANT * share / deviation


def _carry(convolution: nn.Conv2d, read: Tensor, written: Tensor, kernel: Tensor | None = None) -> None:
    """Let a convolution read colours from its input's channels and write them into its output's.

    Args:
        read, written: [channels, colours], how much of each colour is in a channel.
        kernel: what it does in the plane; None: nothing.
    """
    height, width = convolution.kernel_size
    if kernel is None:
        kernel = torch.zeros(height, width)
        kernel[height // 2, width // 2] = 1
    colours = min(read.shape[1], written.shape[1])
    weights = written[:, :colours] @ torch.linalg.pinv(read[:, :colours])  # [out, in]
    convolution.weight.mul_(DEVIATION).add_(weights[:, :, None, None] * kernel)
    convolution.bias.copy_(CONSTANT * _constants(written))


def _plain(channels: int) -> Tensor:
    """A channel for each colour [channels, colours], as in pictures and latents; further channels are none's."""
    return torch.eye(channels, COLOURS)


def _grouped(channels: int, groups: int) -> Tensor:
    """Each group has a colour, its negative, and the constant where there is room [channels, colours]."""
    size = max(2, channels // groups)
    places = torch.arange(channels)
    signs = torch.tensor([1.0, -1.0] + [0.0] * (size - 2))[places % size]
    return signs[:, None] * torch.eye(COLOURS)[places // size % COLOURS]


def _constants(code: Tensor) -> Tensor:
    return (code == 0).all(dim=1)
