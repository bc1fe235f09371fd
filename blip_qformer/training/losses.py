"""The losses of stage 1 and the attention masks that tell them apart (arXiv 2301.12597, section 3.1, figure 2).

One Q-Former serves all three: who may look at whom is the only difference. Masks are bool [B, Q + T, Q + T], True where
the row may look at the column; the first Q are the queries, the others the text.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor


def contrastive_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Queries see queries, text sees text: what is compared must not have met.

    Args:
        attention_mask: [B, T], 1 where there is a token.
    """
    mask = _visible(attention_mask, queries).clone()
    mask[:, :queries, queries:] = False
    mask[:, queries:, :queries] = False
    return mask


def matching_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """All see all, but for padding."""
    return _visible(attention_mask, queries).clone()


def generation_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Queries see queries; a token sees the queries and the tokens up to itself."""
    mask = _visible(attention_mask, queries).clone()
    length = attention_mask.shape[1]
    mask[:, :queries, queries:] = False
    mask[:, queries:, queries:] &= torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return mask


def _visible(attention_mask: Tensor, queries: int) -> Tensor:
    """[B, T] -> [B, Q + T, Q + T]: nobody looks at padding."""
    visible = F.pad(attention_mask.bool(), (queries, 0), value=True)
    return visible[:, None, :].expand(-1, visible.shape[1], -1)


def query_text_similarity(queries: Tensor, texts: Tensor) -> Tensor:
    """How well each picture goes with each text: the best of its queries.

    Args:
        queries: [I, Q, D] of unit length; ``texts``: [T, D] of unit length.

    Returns:
        [I, T], cosines.
    """
    with torch.autocast(queries.device.type, enabled=False):  # half precision would blur what a low temperature tells
        return torch.einsum("iqd,td->itq", queries, texts).amax(dim=-1)


def contrastive_loss(
    image_to_text: Tensor, text_to_image: Tensor, first: int, temperature: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Image-text contrastive loss, both directions.

    Args:
        image_to_text: [B, G], cosines of this process's pictures with all processes' texts; ``text_to_image``: [B, G].
        first: where this process's rows begin among all.
        temperature: what the cosines are divided by.
        smoothing: of the labels.
    """
    targets = torch.arange(first, first + len(image_to_text), device=image_to_text.device)
    losses = [
        F.cross_entropy(similarity / temperature, targets, label_smoothing=smoothing)
        for similarity in (image_to_text, text_to_image)
    ]
    return (losses[0] + losses[1]) / 2


def hard_negatives(similarity: Tensor, first: int, temperature: Tensor, sources: list[torch.Generator]) -> Tensor:
    """For each row another row's partner, drawn the more often the more similar it is.

    Args:
        similarity: [B, G]; row i's own partner is column ``first + i``.
        sources: of chance, one a row.

    Returns:
        [B], columns.

    Raises:
        ValueError: there is no other row.
    """
    if similarity.shape[1] < 2:
        raise ValueError(
            "Matching needs a wrong text for each picture, and one pair has none: set batch_size to 2 or more."
        )
    weights = (similarity / temperature).float().softmax(dim=1) + 1e-4
    own = torch.arange(first, first + len(similarity), device=similarity.device)
    weights = weights.scatter(1, own[:, None], 0.0).cpu()
    drawn = [torch.multinomial(row, 1, generator=source) for row, source in zip(weights, sources, strict=True)]
    return torch.cat(drawn).to(similarity.device)


def generation_loss(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, smoothing: float = 0.0) -> Tensor:
    """Image-grounded text generation: each token from those before it, averaged over all processes' tokens.

    Args:
        logits: [B, T, vocabulary]; ``input_ids``: [B, T]; ``attention_mask``: [B, T].

    Returns:
        This process's share: the mean of all processes' losses is the average over all tokens.
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100)[:, 1:].flatten()  # -100 is what cross_entropy leaves out
    predicted = logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(predicted, labels, label_smoothing=smoothing, reduction="sum")
    return loss / mean_of_processes((labels != -100).sum())


class _GatherRows(torch.autograd.Function):
    """Rows of all processes; a gradient finds its way back to the process that the row came from."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        context.count = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        first = torch.distributed.get_rank() * context.count
        return gradient[first : first + context.count]


def gather_rows(rows: Tensor) -> Tensor:
    """[B, ...] of each process -> [processes * B, ...], in the order of the processes; gradients flow through."""
    return _GatherRows.apply(rows) if _are_several() else rows


def mean_of_processes(count: Tensor) -> Tensor:
    """A number of this process -> the mean over all processes."""
    if not _are_several():
        return count
    total = count.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def process_index() -> int:
    """Which of the training's processes this is."""
    return torch.distributed.get_rank() if _are_several() else 0


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
