"""Attention's values, token by token: how an edit of the probabilities is done without ever building them.

With A = softmax(Q K' / sqrt d), every edit of A here is linear in its columns, and A diag(c) V = A (diag(c) V): so the
values are edited, and the attention stays the fused one. Their projection has no bias: before it or behind it is the
same.

Conditionings of different length are batched by repeating each, so values may hold all tokens several times; what other
nodes append behind them belongs to no token of the prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_values(values: Tensor, factors: Tensor, outside: float = 1.0) -> Tensor:
    """A[:, j] *= factors[j] for every token j; rows of A are not normalised again (arXiv 2208.01626, section 4).

    Args:
        values: [B, T, C], with all tokens of the prompt once or several times.
        factors: [tokens]; outside: the factor of what stands behind the tokens of the prompt.
    """
    return values * per_position(factors, values.shape[1], outside).to(values)[:, None]


def map_values(values: Tensor, mapper: Tensor) -> Tensor:
    """The values for an attention A of the source's tokens, so that it acts as A @ mapper on the edit's.

    Args:
        values: [B, T, C] of the edit.
        mapper: [tokens, tokens] as in :class:`~.alignment.Alignment`, each column perhaps scaled.

    Returns:
        [B, T, C]; the same behind the tokens of the prompt.
    """
    batch, positions, width = values.shape
    tokens = len(mapper)
    copies = positions // tokens
    prompt = values[:, : copies * tokens].reshape(batch, copies, tokens, width)
    mapped = (mapper.to(values) @ prompt).reshape(batch, copies * tokens, width)
    return torch.cat([mapped, values[:, copies * tokens :]], dim=1)


def per_position(per_token: Tensor, positions: int, outside: float) -> Tensor:
    """[..., tokens] -> [..., positions]: the same for each copy of the prompt, and ``outside`` behind the copies."""
    copies = positions // per_token.shape[-1]
    repeated = torch.cat([per_token] * copies, dim=-1)
    return F.pad(repeated, (0, positions - repeated.shape[-1]), value=outside)
