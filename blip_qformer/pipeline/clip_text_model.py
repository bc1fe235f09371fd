"""CLIP's text encoder with a subject's vectors among its words (arXiv 2305.14720, section 3.2), for training.

transformers' own class moves from version to version, and in one of them silently loses the causal mask (REFERENCE 3);
this one is a page of torch, with the published names of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..encoder.layers import quick_gelu
from ..prompt import Token, fill_blocks, insert_subject

PREFIX = "text_model."  # of every published name


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes; the defaults are CLIP-L's."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward_width: int = 3072
    vocabulary_size: int = 49408
    positions: int = 77
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> TextEncoderConfig:
        """From a published ``config.json``; what it leaves out is CLIP-L's."""
        return cls(**{ours: config[theirs] for ours, theirs in _HUB_FIELDS.items() if theirs in config})

    def to_hub(self) -> dict[str, Any]:
        """As ``config.json`` has it."""
        sizes = {theirs: getattr(self, ours) for ours, theirs in _HUB_FIELDS.items()}
        tokens = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
        return {"model_type": "clip_text_model", "hidden_act": "quick_gelu", **sizes, **tokens}


_HUB_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward_width": "intermediate_size",
    "vocabulary_size": "vocab_size",
    "positions": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
}


class TextEncoder(nn.Module):
    """Token embeddings -> what the U-Net's cross-attention reads."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocabulary_size, config.width),
                "position_embedding": nn.Embedding(config.positions, config.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.layers))})
        self.final_layer_norm = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, token_embeddings: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]; a token sees itself and what is before it."""
        positions = self.embeddings["position_embedding"].weight[: token_embeddings.shape[1]]
        hidden = token_embeddings + positions
        for layer in self.encoder["layers"]:
            hidden = layer(hidden)
        return self.final_layer_norm(hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] ids -> [B, T, width], without positions."""
        return self.embeddings["token_embedding"](input_ids)

    def published(self) -> dict[str, Tensor]:
        """The weights under their published names."""
        return {PREFIX + name: weight for name, weight in self.state_dict().items()}

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights under their published names, with or without the outer one."""
        named = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
        self.load_state_dict({name: weight for name, weight in named.items() if not name.endswith("position_ids")})


class _Layer(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind its own norm; the names are the published ones."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.heads = config.heads
        self.layer_norm1 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(config.width, config.width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm2 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(config.width, config.feed_forward_width),
                "fc2": nn.Linear(config.feed_forward_width, config.width),
            }
        )

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.layer_norm1(hidden)
        query, key, value = (
            rearrange(self.self_attn[name](normed), "b t (h d) -> b h t d", h=self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.self_attn["out_proj"](rearrange(seen, "b h t d -> b t (h d)"))
        return hidden + self.mlp["fc2"](quick_gelu(self.mlp["fc1"](self.layer_norm2(hidden))))


def encode_prompts(
    text_encoder: TextEncoder, prompts: Sequence[Sequence[int]], subjects: Sequence[Tensor | None]
) -> Tensor:
    """Encode prompts as Subject Prompt Compose does: through the same functions, the vectors behind the first word.

    Args:
        prompts: the ids of each, without ``<bos>`` and ``<eos>``.
        subjects: for each its vectors [16, width], or None for the prompt alone.

    Returns:
        [B, 77, width]
    """
    length = text_encoder.config.positions
    bos, eos = 49406, 49407  # CLIP pads with <eos>
    rows, places, vectors = [], [], []
    for row, (ids, subject) in enumerate(zip(prompts, subjects, strict=True)):
        tokens = [Token(value, 1.0, 1, "") for value in ids]
        if subject is not None:
            tokens = insert_subject(tokens, subject)
        block = fill_blocks(tokens, length - 2, "truncate")[0]
        values = [bos, *(token.value for token in block), eos]
        values += [eos] * (length - len(values))
        rows.append([eos if isinstance(value, Tensor) else value for value in values])
        for column, value in enumerate(values):
            if isinstance(value, Tensor):
                places.append((row, column))
                vectors.append(value)
    device = text_encoder.final_layer_norm.weight.device
    embeddings = text_encoder.embed(torch.tensor(rows, device=device))  # [B, 77, width]
    if vectors:
        row, column = torch.tensor(places, device=device).unbind(1)
        embeddings = embeddings.index_put((row, column), torch.stack(vectors).to(embeddings.dtype))
    return text_encoder(embeddings)
