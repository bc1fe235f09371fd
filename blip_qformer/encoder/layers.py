"""What the vision transformer and the Q-Former share: attention, an activation and the factory of their layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

#: ``attention(query, key, value, heads, mask=None) -> [B, tokens, width]``, on tensors [B, tokens, width]. ``mask`` is
#: added to the scores and broadcasts to [B, heads, query tokens, key tokens]. ComfyUI's own functions have this form.
AttentionFunction = Callable[..., Tensor]


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """Compute multi-head attention with torch's fused kernel.

    Args:
        query: Queries [B, Q, width].
        key: Keys [B, K, width].
        value: Values [B, K, width].
        heads: The number of heads that the width is split into.
        mask: Numbers added to the scores, broadcast to [B, heads, Q, K]; None adds nothing.

    Returns:
        The attended values [B, Q, width].
    """
    query, key, value = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return rearrange(attended, "b h n d -> b n (h d)")


def quick_gelu(x: Tensor) -> Tensor:
    """Compute CLIP's approximate GELU, x * sigmoid(1.702 x) (github.com/openai/CLIP, ``clip/model.py``).

    It needs one temporary tensor instead of three as far as autograd allows: for 8 images each is 34 MB, and allocating
    that costs more than the arithmetic.
    """
    gate = (1.702 * x).sigmoid_()
    return gate * x if gate.requires_grad else gate.mul_(x)


@dataclass(frozen=True)
class LayerFactory:
    """Make layers of the dtype, on the device and of the classes that a host wants.

    Args:
        dtype: The dtype of the weights; None is torch's default.
        device: The device of the weights; None is torch's default.
        operations: A namespace with ``Linear``, ``Conv2d``, ``LayerNorm`` and ``Embedding``: ``torch.nn``, or a host's
            own that casts and offloads weights.
        attention: The attention function, see :data:`AttentionFunction`.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    operations: Any = nn
    attention: AttentionFunction = scaled_dot_product_attention

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        """Make a linear layer with bias."""
        return self.operations.Linear(inputs, outputs, dtype=self.dtype, device=self.device)

    def patch_embedding(self, width: int, patch_size: int) -> nn.Conv2d:
        """Make a convolution whose kernel size is its stride: one linear layer on every patch."""
        return self.operations.Conv2d(
            3, width, patch_size, stride=patch_size, bias=False, dtype=self.dtype, device=self.device
        )

    def layer_norm(self, width: int, eps: float) -> nn.LayerNorm:
        """Make a layer norm."""
        return self.operations.LayerNorm(width, eps=eps, dtype=self.dtype, device=self.device)

    def embedding(self, entries: int, width: int) -> nn.Embedding:
        """Make a table of vectors."""
        return self.operations.Embedding(entries, width, dtype=self.dtype, device=self.device)

    def parameter(self, *shape: int) -> nn.Parameter:
        """Make a parameter of zeros."""
        return nn.Parameter(torch.zeros(*shape, dtype=self.dtype, device=self.device))
