"""Initial position embeddings of an image encoder that is trained from nothing: sines and cosines of row and column.

Random ones are weak beside a patch's content, and no loss of an untrained encoder depends on where a patch is. After
1500 steps of the small model, a linear probe read a token's column with R² 0.03; a Q-Former that reads such tokens
learns what an image shows, but not where.
"""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor, nn

STRENGTH = 0.5  # beside a patch's content, which is about 1


@torch.no_grad()
def initialise_patch_positions(position_embedding: nn.Parameter) -> None:
    """Give each patch of a square image the waves of its row and column; the class token, the first, gets zeros.

    Args:
        position_embedding: Position embeddings of shape [1, 1 + N, width], N a square number; filled in place.
    """
    _, tokens, width = position_embedding.shape
    edge = math.isqrt(tokens - 1)
    waves = sinusoids(edge, width // 4)  # [edge, width / 2]
    rows = repeat(waves, "row wave -> (row column) wave", column=edge)
    columns = repeat(waves, "column wave -> (row column) wave", row=edge)
    position_embedding.zero_()
    position_embedding[0, 1:, : 4 * (width // 4)] = STRENGTH * torch.cat([rows, columns], dim=1)


def sinusoids(edge: int, count: int) -> Tensor:
    """Compute sines, then cosines, of geometrically spaced frequencies at each of ``edge`` positions.

    The shortest wave changes its sign from one position to the next, the longest once over all of them.

    Args:
        edge: Number of positions.
        count: Number of frequencies.

    Returns:
        The waves, of shape [edge, 2 * count].
    """
    frequencies = math.pi / edge ** torch.linspace(0, 1, count)
    phases = (torch.arange(edge) + 0.5)[:, None] * frequencies  # [edge, count]
    return torch.cat([phases.sin(), phases.cos()], dim=1)
