"""Attention with its probabilities: build A, edit it, multiply by V. What the closed forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def split(tensor: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]"""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def probabilities(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """[B, heads, N, T]"""
    query, key = split(query, heads), split(key, heads)
    return torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)


def attended(a: Tensor, values: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d]"""
    return (a @ split(values, heads)).transpose(1, 2).flatten(2)


def fused(query: Tensor, key: Tensor, values: Tensor, heads: int) -> Tensor:
    """The same without an edit, as torch has it."""
    query, key, values = (split(each, heads) for each in (query, key, values))
    return torch.nn.functional.scaled_dot_product_attention(query, key, values).transpose(1, 2).flatten(2)
