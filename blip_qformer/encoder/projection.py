"""The projection of the Q-Former's queries into CLIP's text embedding space (arXiv 2305.14720, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import LayerFactory, quick_gelu


class Projection(nn.Module):
    """A residual feed-forward layer: x + contract(QuickGELU(expand(norm(x)))).

    Args:
        width: Width of the input and output.
        hidden_width: Width of the hidden layer.
        layer_norm_eps: Epsilon of the layer norm.
        make: The factory of the layers.
    """

    def __init__(self, width: int, hidden_width: int, layer_norm_eps: float, make: LayerFactory) -> None:
        super().__init__()
        self.norm = make.layer_norm(width, layer_norm_eps)
        self.expand = make.linear(width, hidden_width)
        self.contract = make.linear(hidden_width, width)

    def forward(self, queries: Tensor, dropout: Tensor | None = None) -> Tensor:
        """Project queries.

        Args:
            queries: The Q-Former's output [B, Q, width].
            dropout: Factors [B, Q, width] for the residual, in training; None is 1.

        Returns:
            The projected queries [B, Q, width].
        """
        residual = self.contract(quick_gelu(self.expand(self.norm(queries))))
        return queries + (residual if dropout is None else residual * dropout)
