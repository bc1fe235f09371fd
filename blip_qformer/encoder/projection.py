"""The queries' answer becomes words a CLIP text encoder can read (arXiv 2305.14720, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import LayerFactory, quick_gelu


class Projection(nn.Module):
    """[B, Q, width] -> [B, Q, width]: x + contract(QuickGELU(expand(norm(x))))."""

    def __init__(self, width: int, hidden_width: int, layer_norm_eps: float, make: LayerFactory):
        super().__init__()
        self.norm = make.layer_norm(width, layer_norm_eps)
        self.expand = make.linear(width, hidden_width)
        self.contract = make.linear(hidden_width, width)

    def forward(self, queries: Tensor, dropout: Tensor | None = None) -> Tensor:
        """``dropout``: what training multiplies with what is added, [B, Q, width]."""
        added = self.contract(quick_gelu(self.expand(self.norm(queries))))
        return queries + (added if dropout is None else added * dropout)
