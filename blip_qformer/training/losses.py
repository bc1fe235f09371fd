"""Losses of stage 1 and their self-attention masks (arXiv 2301.12597, section 3.1 and figure 2).

One Q-Former serves all three losses; only the masks differ. A mask is a bool tensor of shape [B, Q + T, Q + T], True
where the row may attend to the column; the first Q rows and columns are the queries, the others the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import mean_over_processes

MIN_NEGATIVE_WEIGHT = 1e-4  # so that any wrong pair can come; as in BLIP (salesforce/BLIP, models/blip_pretrain.py)


def contrastive_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Let queries attend to queries and text to text, so that images and texts are encoded apart.

    Args:
        attention_mask: 1 where there is a token and 0 for padding, of shape [B, T].
        queries: Number of queries.

    Returns:
        Mask of shape [B, Q + T, Q + T].
    """
    mask = _without_padding(attention_mask, queries)
    mask[:, :queries, queries:] = False
    mask[:, queries:, :queries] = False
    return mask


def matching_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Let all attend to all but padding.

    Args:
        attention_mask: 1 where there is a token and 0 for padding, of shape [B, T].
        queries: Number of queries.

    Returns:
        Mask of shape [B, Q + T, Q + T].
    """
    return _without_padding(attention_mask, queries)


def generation_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Let queries attend to queries, and a token to the queries and the tokens up to itself.

    Args:
        attention_mask: 1 where there is a token and 0 for padding, of shape [B, T].
        queries: Number of queries.

    Returns:
        Mask of shape [B, Q + T, Q + T].
    """
    mask = _without_padding(attention_mask, queries)
    length = attention_mask.shape[1]
    mask[:, :queries, queries:] = False
    mask[:, queries:, queries:] &= torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return mask


def _without_padding(attention_mask: Tensor, queries: int) -> Tensor:
    """[B, T] -> [B, Q + T, Q + T], False in the columns of padding."""
    columns = F.pad(attention_mask.bool(), (queries, 0), value=True)  # [B, Q + T]
    return columns[:, None, :].repeat(1, columns.shape[1], 1)


def query_text_similarity(queries: Tensor, texts: Tensor) -> Tensor:
    """Compare each image with each text by the image's best query.

    Args:
        queries: Projected queries of unit length, of shape [I, Q, D].
        texts: Projected texts of unit length, of shape [T, D].

    Returns:
        Cosines of shape [I, T].
    """
    with torch.autocast(queries.device.type, enabled=False):  # half precision would blur what a low temperature tells
        return torch.einsum("iqd,td->itq", queries, texts).amax(dim=-1)


def contrastive_loss(
    image_to_text: Tensor,
    text_to_image: Tensor,
    row_offset: int,
    temperature: Tensor | float,
    smoothing: float = 0.0,
) -> Tensor:
    """Image-text contrastive loss, the mean of both directions.

    Args:
        image_to_text: Cosines of this process's images with all processes' texts, of shape [B, G].
        text_to_image: Cosines of this process's texts with all processes' images, of shape [B, G].
        row_offset: Number of rows in the processes before this one.
        temperature: Number that the cosines are divided by.
        smoothing: Label smoothing.

    Returns:
        Loss, averaged over the batch.
    """
    targets = torch.arange(row_offset, row_offset + len(image_to_text), device=image_to_text.device)
    losses = [
        F.cross_entropy(similarity / temperature, targets, label_smoothing=smoothing)
        for similarity in (image_to_text, text_to_image)
    ]
    return (losses[0] + losses[1]) / 2


def hard_negatives(
    similarity: Tensor, row_offset: int, temperature: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Sample another row's partner for each row, the more often the more similar it is.

    Args:
        similarity: Cosines of shape [B, G]; row i's own partner is column ``row_offset + i``.
        row_offset: Number of rows in the processes before this one.
        temperature: Number that the cosines are divided by.
        generators: Generator of each row.

    Returns:
        Columns of shape [B].

    Raises:
        ValueError: There is no other row.
    """
    if similarity.shape[1] < 2:
        raise ValueError(
            "Matching needs a wrong text for each picture, and one pair has none: set batch_size to 2 or more."
        )
    weights = (similarity / temperature).float().softmax(dim=1) + MIN_NEGATIVE_WEIGHT
    own = torch.arange(row_offset, row_offset + len(similarity), device=similarity.device)
    weights = weights.scatter(1, own[:, None], 0.0).cpu()
    sampled = [torch.multinomial(row, 1, generator=each) for row, each in zip(weights, generators, strict=True)]
    return torch.cat(sampled).to(similarity.device)


def generation_loss(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, smoothing: float = 0.0) -> Tensor:
    """Image-grounded text generation: predict each token from those before it.

    Args:
        logits: Scores of shape [B, T, vocabulary].
        input_ids: Tokens of shape [B, T].
        attention_mask: 1 where there is a token and 0 for padding, of shape [B, T].
        smoothing: Label smoothing.

    Returns:
        This process's share: the mean over all processes is the average over all tokens.
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100)[:, 1:].flatten()  # cross_entropy leaves -100 out
    predicted = logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(predicted, labels, label_smoothing=smoothing, reduction="sum")
    return loss / mean_over_processes((labels != -100).sum())
