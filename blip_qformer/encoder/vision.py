"""A picture becomes tokens: CLIP's vision transformer (arXiv 2103.00020), read one block before its end."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import VisionConfig
from .layers import LayerFactory, quick_gelu


class VisionTransformer(nn.Module):
    """Pixels [B, 3, S, S] -> tokens [B, 1 + (S / patch)^2, width], the class token first."""

    def __init__(self, config: VisionConfig, make: LayerFactory):
        super().__init__()
        self.patch_embedding = make.patches(config.width, config.patch_size)
        self.class_embedding = make.parameter(1, 1, config.width)
        self.position_embedding = make.parameter(1, config.tokens, config.width)
        self.pre_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config, make) for _ in range(config.layers))
        self.post_norm = make.layer_norm(config.width, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values)  # [B, width, S / patch, S / patch]
        patches = rearrange(patches, "b c h w -> b (h w) c")
        class_token = self.class_embedding.to(patches).expand(len(patches), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.position_embedding.to(patches)
        tokens = self.pre_norm(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.post_norm(tokens)


class VisionBlock(nn.Module):
    """Self-attention and a feed-forward layer, each behind its own norm and added to what came in."""

    def __init__(self, config: VisionConfig, make: LayerFactory):
        super().__init__()
        self.attention_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.attention = VisionAttention(config, make)
        self.feed_forward_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.expand = make.linear(config.width, config.feed_forward_width)
        self.contract = make.linear(config.feed_forward_width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.contract(quick_gelu(self.expand(self.feed_forward_norm(tokens))))


class VisionAttention(nn.Module):
    """Every token looks at every token; query, key and value come out of one linear layer."""

    def __init__(self, config: VisionConfig, make: LayerFactory):
        super().__init__()
        self.heads = config.heads
        self.attend = make.attention
        self.query_key_value = make.linear(config.width, 3 * config.width)
        self.output = make.linear(config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.query_key_value(tokens).chunk(3, dim=-1)  # 3 x [B, N, width]
        return self.output(self.attend(query, key, value, self.heads))
