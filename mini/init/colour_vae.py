"""Initial weights of a VAE that scales an image down eight times and up again, and learns the rest.

From random weights a small VAE needs thousands of steps to learn what colour is, because its group norms remove a
group's mean and scale, and of a group of one or two channels nothing is left. Here every group holds a colour, its
negative and a constant, from which colour and brightness can be recovered after the norm; each layer passes them on.

In this module a *code* is a matrix of shape [channels, colours] that says how much of each colour a channel holds.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

COLOURS = 4  # as many as a latent has channels; the encoder is free to use the fourth
CONSTANT = 4.0  # beside colours in -1..1: so large that a group's scale hardly depends on them
RANDOM_SCALE = 0.05  # of the random weights that remain beside the colours
LOG_VARIANCE = -7.0  # of the latents: random weights would begin with as much noise as signal
HALVE = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 4  # diffusers pads right and below
SMOOTH = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


@torch.no_grad()
def initialise_vae(vae: AutoencoderKL) -> None:
    """Change a VAE's random weights, in place, so that its latents are the scaled-down image's red, green and blue.

    The decoder's output layer needs 96 channels or more; with fewer a group has no room for its constant, and the
    decoded image is only roughly the original.

    Args:
        vae: The VAE, with random weights.
    """
    groups = vae.config["norm_num_groups"]
    for name, module in vae.named_modules():
        if name.endswith("conv2"):  # last in a residual block, which begins as almost nothing
            module.weight.mul_(RANDOM_SCALE / 2)
            module.bias.zero_()
        if name.endswith("to_out.0"):  # last in the attention
            module.weight.zero_()
            module.bias.zero_()
        if name.endswith("conv1"):
            module.bias.copy_(1 - 2 * (torch.arange(len(module.bias)) % 2))
    for network, blocks in ((vae.encoder, vae.encoder.down_blocks), (vae.decoder, vae.decoder.up_blocks)):
        conv_in = network.conv_in
        _map_code(conv_in, _plain_code(conv_in.in_channels), _group_code(conv_in.out_channels, groups))
        for block in cast(nn.ModuleList, blocks):
            _initialise_block(block, groups)
        _initialise_output(cast(nn.GroupNorm, network.conv_norm_out), network.conv_out, groups)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        if conv is not None:
            _map_code(conv, torch.eye(conv.in_channels), torch.eye(conv.out_channels))
    if vae.quant_conv is not None:
        _bias_of(vae.quant_conv)[vae.config["latent_channels"] :] = LOG_VARIANCE


def _initialise_block(block: nn.Module, groups: int) -> None:
    """Let a block's shortcuts and resampling layers pass the colours on."""
    for resnet in cast(nn.ModuleList, block.resnets):
        if (shortcut := getattr(resnet, "conv_shortcut", None)) is not None:
            _keep_code(shortcut, groups)
    for sampler in getattr(block, "downsamplers", None) or []:
        _keep_code(sampler.conv, groups, HALVE)
    for sampler in getattr(block, "upsamplers", None) or []:
        _keep_code(sampler.conv, groups, SMOOTH)


def _initialise_output(norm: nn.GroupNorm, conv: nn.Conv2d, groups: int) -> None:
    """Read colours behind norm and SiLU: silu(a) - silu(-a) = a, once the mean that the norm removed is added again."""
    code = _group_code(conv.in_channels, groups)
    _map_code(conv, code, _plain_code(conv.out_channels))
    _bias_of(conv).zero_()
    if (is_constant := _constant_channels(code)).any():
        fraction = float(is_constant.float().mean())
        std = CONSTANT * (fraction * (1 - fraction)) ** 0.5  # of a group that holds its constant and no colour
        conv.weight.mul_(2 * std)
        norm.bias[~is_constant] = CONSTANT * fraction / std


def _keep_code(conv: nn.Conv2d, groups: int, kernel: Tensor | None = None) -> None:
    """Let a convolution read and write colours in groups."""
    _map_code(conv, _group_code(conv.in_channels, groups), _group_code(conv.out_channels, groups), kernel)


def _map_code(conv: nn.Conv2d, in_code: Tensor, out_code: Tensor, kernel: Tensor | None = None) -> None:
    """Let a convolution read the colours of one code and write them in another, beside its scaled random weights.

    Args:
        conv: The convolution, which is changed in place.
        in_code: Code of its input, of shape [in_channels, colours].
        out_code: Code of its output, of shape [out_channels, colours].
        kernel: Effect of the convolution in the plane, of shape [height, width]; None is the identity.
    """
    height, width = conv.kernel_size
    if kernel is None:
        kernel = torch.zeros(height, width)
        kernel[height // 2, width // 2] = 1
    colours = min(in_code.shape[1], out_code.shape[1])
    weights = out_code[:, :colours] @ torch.linalg.pinv(in_code[:, :colours])  # [out_channels, in_channels]
    conv.weight.mul_(RANDOM_SCALE).add_(weights[:, :, None, None] * kernel)
    _bias_of(conv).copy_(CONSTANT * _constant_channels(out_code))


def _bias_of(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # every convolution of an AutoencoderKL has one
    return conv.bias


def _plain_code(channels: int) -> Tensor:
    """Return the code of images and latents: one channel for each colour; further channels are empty."""
    return torch.eye(channels, COLOURS)


def _group_code(channels: int, groups: int) -> Tensor:
    """Return the code of hidden layers: in each group a colour, its negative, and constants where there is room."""
    size = max(2, channels // groups)
    index = torch.arange(channels)
    signs = torch.tensor([1.0, -1.0] + [0.0] * (size - 2))[index % size]
    return signs[:, None] * torch.eye(COLOURS)[index // size % COLOURS]


def _constant_channels(code: Tensor) -> Tensor:
    """Return which channels hold no colour, of shape [channels]."""
    return (code == 0).all(dim=1)
