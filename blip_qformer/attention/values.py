"""The values of attention, token by token: how its probabilities are edited without ever computing them.

With A = softmax(Q K' / sqrt d), every edit of A here is linear in its columns, and (A diag(c)) V = A (diag(c) V): so
the values are edited, and the attention stays the fused one. The projection of the values has no bias, so that it makes
no difference whether they are edited before it or behind it.

ComfyUI batches conditionings of different lengths by repeating each, so the values may hold all tokens several times;
what other nodes append behind them belongs to no token of the prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_values(values: Tensor, factors: Tensor, outside: float = 1.0) -> Tensor:
    """Set A[:, j] *= factors[j] for every token j, without normalising A again (arXiv 2208.01626, section 4).

    Args:
        values: Values of shape [B, T, C], with all tokens of the prompt once or several times.
        factors: The factor of each token, of shape [tokens].
        outside: The factor of what stands behind the tokens of the prompt.

    Returns:
        Values of shape [B, T, C].
    """
    return values * per_position(factors, values.shape[1], outside).to(values)[:, None]


def map_values(values: Tensor, mapper: Tensor) -> Tensor:
    """Map the values, so that an attention A on the source's tokens acts as A @ mapper on the edited prompt's.

    Args:
        values: The edited image's values of shape [B, T, C].
        mapper: A mapper as in :class:`~.alignment.Alignment`, its columns perhaps scaled, of shape [tokens, tokens].

    Returns:
        Values of shape [B, T, C], unchanged behind the tokens of the prompt.
    """
    batch, positions, width = values.shape
    tokens = len(mapper)
    copies = positions // tokens
    prompt = values[:, : copies * tokens].reshape(batch, copies, tokens, width)
    mapped = (mapper.to(values) @ prompt).reshape(batch, copies * tokens, width)
    return torch.cat([mapped, values[:, copies * tokens :]], dim=1)


def per_position(per_token: Tensor, positions: int, outside: float) -> Tensor:
    """Repeat something per token for every copy of the prompt, and fill up with a number.

    Args:
        per_token: A tensor of shape [..., tokens].
        positions: Number of positions, of which the copies of the prompt are the first.
        outside: What stands behind the copies.

    Returns:
        A tensor of shape [..., positions].
    """
    copies = positions // per_token.shape[-1]
    repeated = torch.cat([per_token] * copies, dim=-1)
    return F.pad(repeated, (0, positions - repeated.shape[-1]), value=outside)
