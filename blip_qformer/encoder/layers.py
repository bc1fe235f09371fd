"""What the vision transformer and the Q-Former share: attention, an activation, and who makes their linear layers."""

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
    """Multi-head attention through torch's fused kernel.

    Args:
        query: [B, Q, width]; ``key`` and ``value``: [B, K, width].
        mask: added to the scores, broadcast to [B, heads, Q, K].

    Returns:
        [B, Q, width]
    """
    query, key, value = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return rearrange(attended, "b h n d -> b n (h d)")


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's cheap GELU, x * sigmoid(1.702 x) (github.com/openai/CLIP, ``clip/model.py``).

    It works in one temporary instead of three as far as autograd allows: for 8 pictures each is 34 MB, and to get that
    from the system costs more than the arithmetic.
    """
    gate = (1.702 * x).sigmoid_()
    return gate * x if gate.requires_grad else gate.mul_(x)


@dataclass(frozen=True)
class LayerFactory:
    """Makes layers where, how precise, and of which kind a host wants them.

    Args:
        operations: a namespace with ``Linear``, ``Conv2d``, ``LayerNorm``, ``Embedding``: ``torch.nn``, or a host's own
            that casts and offloads weights.
        attention: see :data:`AttentionFunction`.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    operations: Any = nn
    attention: AttentionFunction = scaled_dot_product_attention

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        return self.operations.Linear(inputs, outputs, dtype=self.dtype, device=self.device)

    def patches(self, width: int, patch_size: int) -> nn.Conv2d:
        """A convolution whose kernel is its stride: one linear layer on every patch."""
        return self.operations.Conv2d(
            3, width, patch_size, stride=patch_size, bias=False, dtype=self.dtype, device=self.device
        )

    def layer_norm(self, width: int, eps: float) -> nn.LayerNorm:
        return self.operations.LayerNorm(width, eps=eps, dtype=self.dtype, device=self.device)

    def embedding(self, entries: int, width: int) -> nn.Embedding:
        return self.operations.Embedding(entries, width, dtype=self.dtype, device=self.device)

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(*shape, dtype=self.dtype, device=self.device))
