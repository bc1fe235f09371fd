"""The Q-Former (arXiv 2301.12597, section 3.1): learned queries read a picture while they hear a word.

Queries and text share self-attention. Only the queries look at the picture, and queries and text each have a
feed-forward layer of their own. It is a BERT in all else: every step is added to its input and *then* normalised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import QFormerConfig
from .layers import LayerFactory


class QFormer(nn.Module):
    """Image tokens and a tokenized word -> the queries' answer [B, Q, width]."""

    def __init__(self, config: QFormerConfig, image_width: int, make: LayerFactory):
        super().__init__()
        self.query_tokens = make.parameter(1, config.query_tokens, config.width)
        self.word_embedding = make.embedding(config.vocabulary_size, config.width)
        self.position_embedding = make.embedding(config.text_positions, config.width)
        self.embedding_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.layers = nn.ModuleList(
            QFormerLayer(config, image_width, make, sees_image=index % config.cross_attention_frequency == 0)
            for index in range(config.layers)
        )

    def forward(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Args:
        image_tokens: [B, N, image_width]
        input_ids: [B, T], the word as ``[CLS] word [SEP]``, padded.
        attention_mask: [B, T], 1 where there is a token, 0 where there is padding.
        """
        queries = self.query_tokens.to(image_tokens).expand(len(image_tokens), -1, -1)
        text = self.embed_text(input_ids, image_tokens.dtype)
        tokens = self.embedding_norm(torch.cat([queries, text], dim=1))  # [B, Q + T, width]
        mask = padding_mask(attention_mask, queries.shape[1], tokens.dtype)
        queries, text = tokens.split([queries.shape[1], text.shape[1]], dim=1)
        for layer in self.layers:
            queries, text = layer(queries, text, image_tokens, mask)
        return queries

    def embed_text(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T] ids -> [B, T, width]; only text has positions, the queries are a set."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Each by itself: what a host may store weights in, it cannot always add in.
        return self.word_embedding(input_ids).to(dtype) + self.position_embedding(positions).to(dtype)


def padding_mask(attention_mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """[B, T] of 1 and 0 -> [B, 1, Q + T, Q + T] to add to scores: nobody looks at padding."""
    visible = F.pad(attention_mask.bool(), (queries, 0), value=True)  # [B, Q + T]
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    hidden = hidden.masked_fill(~visible, torch.finfo(dtype).min)
    return hidden[:, None, None, :].expand(-1, 1, visible.shape[1], -1)


class QFormerLayer(nn.Module):
    """One layer: self-attention over queries and text, cross-attention of the queries, two feed-forward layers."""

    def __init__(self, config: QFormerConfig, image_width: int, make: LayerFactory, sees_image: bool):
        super().__init__()
        self.self_attention = QFormerAttention(config, config.width, make)
        self.cross_attention = QFormerAttention(config, image_width, make) if sees_image else None
        self.query_feed_forward = QFormerFeedForward(config, make)
        self.text_feed_forward = QFormerFeedForward(config, make)

    def forward(self, queries: Tensor, text: Tensor, image_tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([queries, text], dim=1)
        tokens = self.self_attention(tokens, tokens, mask)
        parts = tokens.split([queries.shape[1], text.shape[1]], dim=1)
        queries, text = (part.contiguous() for part in parts)  # else linear layers go picture by picture
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, image_tokens)
        return self.query_feed_forward(queries), self.text_feed_forward(text)


class QFormerAttention(nn.Module):
    """``tokens`` look at ``context``; what they saw is added to them and normalised."""

    def __init__(self, config: QFormerConfig, context_width: int, make: LayerFactory):
        super().__init__()
        self.heads = config.heads
        self.attend = make.attention
        self.query = make.linear(config.width, config.width)
        self.key = make.linear(context_width, config.width)
        self.value = make.linear(context_width, config.width)
        self.output = make.linear(config.width, config.width)
        self.norm = make.layer_norm(config.width, config.layer_norm_eps)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.attend(self.query(tokens), self.key(context), self.value(context), self.heads, mask=mask)
        return self.norm(tokens + self.output(seen))


class QFormerFeedForward(nn.Module):
    """Two linear layers with a GELU between; their result is added and normalised."""

    def __init__(self, config: QFormerConfig, make: LayerFactory):
        super().__init__()
        self.expand = make.linear(config.width, config.feed_forward_width)
        self.contract = make.linear(config.feed_forward_width, config.width)
        self.norm = make.layer_norm(config.width, config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens + self.contract(F.gelu(self.expand(tokens))))
