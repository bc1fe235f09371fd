"""CLIP's text model with subject vectors among its tokens (arXiv 2305.14720, section 3.2), for training.

transformers' own class changes between versions, and one of them drops the causal mask without a word. This one depends
on torch alone and keeps the names of the published weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..encoder.config import Epsilon, Heads, Layers, Positions, Vocabulary, Width, check_heads
from ..encoder.layers import quick_gelu
from ..plain_data import validate
from ..prompt import Token, fill_blocks, insert_subject

HUB_PREFIX = "text_model."  # of every published key
BOS, EOS = 49406, 49407  # ids in CLIP's vocabulary; <eos> is the padding too


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CLIPTextModelConfig:
    """Sizes of a CLIP text model; the defaults are CLIP-L's."""

    width: Width = 768
    layers: Layers = 12
    heads: Heads = 12
    feed_forward_width: Width = 3072
    vocabulary_size: Vocabulary = 49408
    positions: Positions = 77
    layer_norm_eps: Epsilon = 1e-5

    @model_validator(mode="after")
    def _check_shares(self) -> CLIPTextModelConfig:
        check_heads(self.width, self.heads)
        return self

    @classmethod
    def from_hub(cls, config: Mapping[str, Any], source: str = "The text encoder's config") -> CLIPTextModelConfig:
        """Read a published ``config.json``; a field that is missing there has CLIP-L's value.

        Args:
            config: Its content.
            source: Where it stands, as the subject of an error's sentence.

        Raises:
            ValueError: A value is of another type, or out of bounds.
        """
        return validate(cls, {ours: config[theirs] for ours, theirs in _HUB_FIELDS.items() if theirs in config}, source)

    def to_hub(self) -> dict[str, Any]:
        """Return the content of a ``config.json``."""
        sizes = {theirs: getattr(self, ours) for ours, theirs in _HUB_FIELDS.items()}
        tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
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


class CLIPTextModel(nn.Module):
    """A causal transformer over token embeddings, whose output the U-Net's cross-attention reads.

    Args:
        config: Sizes of the transformer.
    """

    def __init__(self, config: CLIPTextModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, token_embeddings: Tensor) -> Tensor:
        """Encode token embeddings.

        Args:
            token_embeddings: Embeddings without positions, of shape [B, T, width].

        Returns:
            The last hidden states, normalised, of shape [B, T, width].
        """
        position_embeddings = self.embeddings.position_embedding.weight[: token_embeddings.shape[1]]  # [T, width]
        hidden = token_embeddings + position_embeddings
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return self.final_layer_norm(hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed token ids of shape [B, T], without positions; the result has shape [B, T, width]."""
        return self.embeddings.token_embedding(input_ids)

    def hub_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict with the published keys."""
        return {HUB_PREFIX + name: weight for name, weight in self.state_dict().items()}

    def load_hub_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a state dict with the published keys, with or without their prefix.

        Args:
            state_dict: The weights; ``position_ids``, which old files hold, is ignored.

        Raises:
            RuntimeError: Keys or shapes do not fit.
        """
        renamed = {name.removeprefix(HUB_PREFIX): weight for name, weight in state_dict.items()}
        self.load_state_dict({name: weight for name, weight in renamed.items() if not name.endswith("position_ids")})


# The modules below are nested and named as in the published weights.


class _Embeddings(nn.Module):
    """Embeddings of tokens and of their positions."""

    def __init__(self, config: CLIPTextModelConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)


class _Encoder(nn.Module):
    """The transformer's layers."""

    def __init__(self, config: CLIPTextModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))


class _Layer(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind its own norm."""

    def __init__(self, config: CLIPTextModelConfig) -> None:
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
        normed = self.layer_norm1(hidden)  # [B, T, width]
        query, key, value = (
            rearrange(self.self_attn[name](normed), "b t (h d) -> b h t d", h=self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.self_attn["out_proj"](rearrange(attended, "b h t d -> b t (h d)"))
        return hidden + self.mlp["fc2"](quick_gelu(self.mlp["fc1"](self.layer_norm2(hidden))))


def encode_prompts(
    text_encoder: CLIPTextModel, prompts: Sequence[Sequence[int]], subjects: Sequence[Tensor | None]
) -> Tensor:
    """Encode prompts as the node Subject Prompt Compose does: subject vectors follow the first word.

    Args:
        text_encoder: The text model.
        prompts: Token ids of each prompt, without ``<bos>`` and ``<eos>``.
        subjects: Subject vectors of shape [16, width] for each prompt, or None for the prompt alone.

    Returns:
        The prompts' context of shape [B, 77, width].
    """
    length = text_encoder.config.positions
    input_ids, positions, vectors = [], [], []
    for row, (ids, subject) in enumerate(zip(prompts, subjects, strict=True)):
        tokens = [Token(value, 1.0, 1, "") for value in ids]
        if subject is not None:
            tokens = insert_subject(tokens, subject)
        block = fill_blocks(tokens, length - 2, "truncate")[0]
        values = [BOS, *(token.value for token in block), EOS]
        values += [EOS] * (length - len(values))
        input_ids.append([EOS if isinstance(value, Tensor) else value for value in values])
        for column, value in enumerate(values):
            if isinstance(value, Tensor):
                positions.append((row, column))
                vectors.append(value)
    device = text_encoder.final_layer_norm.weight.device
    embeddings = text_encoder.embed(torch.tensor(input_ids, device=device))  # [B, 77, width]
    if vectors:
        rows, columns = torch.tensor(positions, device=device).unbind(1)
        embeddings = embeddings.index_put((rows, columns), torch.stack(vectors).to(embeddings.dtype))
    return text_encoder(embeddings)
