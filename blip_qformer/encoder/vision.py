"""CLIP's vision transformer (arXiv 2103.00020), without its last block: an image -> tokens."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import VisionConfig
from .layers import LayerFactory, quick_gelu


class VisionTransformer(nn.Module):
    """A pre-norm transformer on the patches of an image.

    Args:
        config: The sizes.
        make: The factory of the layers.
    """

    def __init__(self, config: VisionConfig, make: LayerFactory) -> None:
        super().__init__()
        self.patch_embedding = make.patch_embedding(config.width, config.patch_size)
        self.class_embedding = make.parameter(1, 1, config.width)
        self.position_embedding = make.parameter(1, config.tokens, config.width)
        self.pre_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config, make) for _ in range(config.layers))
        self.post_norm = make.layer_norm(config.width, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute the tokens of a batch of images.

        Args:
            pixel_values: Images [B, 3, S, S], normalised with CLIP's mean and standard deviation.

        Returns:
            Tokens [B, 1 + (S / patch)^2, width], the class token first.
        """
        patches = self.patch_embedding(pixel_values)  # [B, width, S / patch, S / patch]
        patches = rearrange(patches, "b c h w -> b (h w) c")
        class_token = self.class_embedding.to(patches).expand(len(patches), -1, -1)  # [B, 1, width]
        tokens = torch.cat([class_token, patches], dim=1) + self.position_embedding.to(patches)
        tokens = self.pre_norm(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.post_norm(tokens)


class VisionBlock(nn.Module):
    """One block: pre-norm self-attention and a pre-norm feed-forward layer, both residual.

    Args:
        config: The sizes.
        make: The factory of the layers.
    """

    def __init__(self, config: VisionConfig, make: LayerFactory) -> None:
        super().__init__()
        self.attention_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.attention = VisionAttention(config, make)
        self.feed_forward_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.expand = make.linear(config.width, config.feed_forward_width)
        self.contract = make.linear(config.feed_forward_width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the block on tokens [B, N, width]."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.contract(quick_gelu(self.expand(self.feed_forward_norm(tokens))))


class VisionAttention(nn.Module):
    """Self-attention whose query, key and value come out of one linear layer.

    Args:
        config: The sizes.
        make: The factory of the layers.
    """

    def __init__(self, config: VisionConfig, make: LayerFactory) -> None:
        super().__init__()
        self.heads = config.heads
        self.attend = make.attention
        self.query_key_value = make.linear(config.width, 3 * config.width)
        self.output = make.linear(config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute self-attention on tokens [B, N, width]."""
        query, key, value = self.query_key_value(tokens).chunk(3, dim=-1)  # 3 x [B, N, width]
        return self.output(self.attend(query, key, value, self.heads))
