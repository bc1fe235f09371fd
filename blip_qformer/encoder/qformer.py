"""The Q-Former (arXiv 2301.12597, section 3.1): learned queries attend to an image and to a word.

Queries and text share self-attention. Only the queries attend to the image, and queries and text each have a
feed-forward layer of their own. All else is BERT: each residual is added and *then* normalised (post-norm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import QFormerConfig
from .layers import LayerFactory


class QFormer(nn.Module):
    """A BERT with learned queries that attend to image tokens.

    Args:
        config: The sizes.
        image_width: Width of an image token.
        make: The factory of the layers.
    """

    def __init__(self, config: QFormerConfig, image_width: int, make: LayerFactory) -> None:
        super().__init__()
        self.query_tokens = make.parameter(1, config.query_tokens, config.width)
        self.word_embedding = make.embedding(config.vocabulary_size, config.width)
        self.position_embedding = make.embedding(config.text_positions, config.width)
        self.embedding_norm = make.layer_norm(config.width, config.layer_norm_eps)
        self.layers = nn.ModuleList(
            QFormerLayer(config, image_width, make, has_cross_attention=index % config.cross_attention_frequency == 0)
            for index in range(config.layers)
        )

    def forward(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the queries of a batch of images and words.

        Args:
            image_tokens: Image tokens [B, N, image_width].
            input_ids: Token ids [B, T], each row ``[CLS] word [SEP]`` and padding.
            attention_mask: Numbers [B, T], 1 for a token and 0 for padding.

        Returns:
            The queries after the last layer [B, Q, width].
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
        """Embed token ids [B, T] as [B, T, width]. Only text has positions; the queries are a set.

        Args:
            input_ids: Token ids [B, T].
            dtype: The dtype to compute in.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Cast before the sum: a host may store weights in a dtype that has no addition.
        return self.word_embedding(input_ids).to(dtype) + self.position_embedding(positions).to(dtype)


def padding_mask(attention_mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Return the mask that keeps queries and text from attending to padding.

    Args:
        attention_mask: Numbers [B, T], 1 for a token and 0 for padding.
        queries: The number of queries, which stand before the text.
        dtype: The dtype of the scores.

    Returns:
        Numbers [B, 1, Q + T, Q + T] to be added to the scores.
    """
    visible = F.pad(attention_mask.bool(), (queries, 0), value=True)  # [B, Q + T]
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    hidden = hidden.masked_fill(~visible, torch.finfo(dtype).min)
    return hidden[:, None, None, :].expand(-1, 1, visible.shape[1], -1)


class QFormerLayer(nn.Module):
    """One layer: self-attention over queries and text, cross-attention of the queries, two feed-forward layers.

    Args:
        config: The sizes.
        image_width: Width of an image token.
        make: The factory of the layers.
        has_cross_attention: Whether the queries attend to the image in this layer.
    """

    def __init__(self, config: QFormerConfig, image_width: int, make: LayerFactory, has_cross_attention: bool) -> None:
        super().__init__()
        self.self_attention = QFormerAttention(config, config.width, make)
        self.cross_attention = QFormerAttention(config, image_width, make) if has_cross_attention else None
        self.query_feed_forward = QFormerFeedForward(config, make)
        self.text_feed_forward = QFormerFeedForward(config, make)

    def forward(self, queries: Tensor, text: Tensor, image_tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the layer.

        Args:
            queries: Queries [B, Q, width].
            text: Text tokens [B, T, width].
            image_tokens: Image tokens [B, N, image_width].
            mask: See :func:`padding_mask`.

        Returns:
            Queries and text tokens, of the same shapes.
        """
        tokens = torch.cat([queries, text], dim=1)
        tokens = self.self_attention(tokens, tokens, mask)
        queries, text = tokens.split([queries.shape[1], text.shape[1]], dim=1)
        queries, text = queries.contiguous(), text.contiguous()  # or linear layers would run once for each image
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, image_tokens)
        return self.query_feed_forward(queries), self.text_feed_forward(text)


class QFormerAttention(nn.Module):
    """Post-norm attention: norm(tokens + attention(tokens, context)).

    Args:
        config: The sizes.
        context_width: Width of a context token.
        make: The factory of the layers.
    """

    def __init__(self, config: QFormerConfig, context_width: int, make: LayerFactory) -> None:
        super().__init__()
        self.heads = config.heads
        self.attend = make.attention
        self.query = make.linear(config.width, config.width)
        self.key = make.linear(context_width, config.width)
        self.value = make.linear(context_width, config.width)
        self.output = make.linear(config.width, config.width)
        self.norm = make.layer_norm(config.width, config.layer_norm_eps)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let tokens attend to a context.

        Args:
            tokens: Tokens [B, N, width].
            context: Context tokens [B, M, context_width].
            mask: Numbers added to the scores, broadcast to [B, heads, N, M].

        Returns:
            Tokens [B, N, width].
        """
        attended = self.attend(self.query(tokens), self.key(context), self.value(context), self.heads, mask=mask)
        return self.norm(tokens + self.output(attended))


class QFormerFeedForward(nn.Module):
    """Post-norm feed-forward layer: norm(x + contract(GELU(expand(x)))).

    Args:
        config: The sizes.
        make: The factory of the layers.
    """

    def __init__(self, config: QFormerConfig, make: LayerFactory) -> None:
        super().__init__()
        self.expand = make.linear(config.width, config.feed_forward_width)
        self.contract = make.linear(config.feed_forward_width, config.width)
        self.norm = make.layer_norm(config.width, config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the layer on tokens [B, N, width]."""
        return self.norm(tokens + self.contract(F.gelu(self.expand(tokens))))
