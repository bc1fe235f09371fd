"""Stage 1, multimodal representation learning (arXiv 2305.14720, section 3.1; 2301.12597, section 3.1).

The Q-Former learns to read from an image what text says about it, by three losses at once. The image encoder is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.collate import Batch, multimodal_batch
from ...encoder.qformer import QFormer
from ...encoder.tokenizer import DEC_TOKEN, bert_tokenizer
from ...pipeline import Pipeline
from ..distributed import gather_rows, process_index
from ..losses import (
    contrastive_loss,
    contrastive_mask,
    generation_loss,
    generation_mask,
    hard_negatives,
    matching_mask,
    query_text_similarity,
)
from ..options import Count, Fraction, OptionGroup, PositiveCount
from .base import CollateFn, Stage, make_generators

TEMPERATURES = 0.001, 0.5  # smallest and largest


class MultimodalStage(Stage):
    """Contrast, matching and generation on (photograph, caption), one Q-Former for all."""

    name = "multimodal"
    uses = ("encoder",)
    trains = ("encoder.qformer",)

    class Options(OptionGroup):
        """Options of stage 1.

        Args:
            shared_width: Width of the space where images and texts are compared.
            smoothing: Label smoothing of contrast and generation.
            caption_tokens: Tokens that captions are cut to, ``[CLS]`` and ``[SEP]`` included.
        """

        shared_width: PositiveCount = 256
        smoothing: Fraction = 0.1
        caption_tokens: Count = 32

    options: Options

    def __init__(self, pipeline: Pipeline, options: Options, output: Path):
        super().__init__(pipeline, options, output)
        sizes = pipeline.encoder.config.qformer
        if not 3 <= options.caption_tokens <= sizes.text_positions:
            raise ValueError(
                f"The option caption_tokens is {options.caption_tokens}, but this Q-Former reads 3 to "
                f"{sizes.text_positions}."
            )
        self.image_head = nn.Linear(sizes.width, options.shared_width)
        self.text_head = nn.Linear(sizes.width, options.shared_width)
        self.matching_head = nn.Linear(sizes.width, 2)
        self.word_head = WordHead(sizes.width, sizes.vocabulary_size, sizes.layer_norm_eps)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    @property
    def collate_fn(self) -> CollateFn:
        """Photographs and captions."""
        return partial(multimodal_batch, size=self.image_size, tokens=self.options.caption_tokens)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the sum of the three losses, each of them, and how often an image finds its own caption."""
        ids, attention_mask = batch["input_ids"], batch["attention_mask"]  # [B, T] each
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURES)  # as in BLIP (arXiv 2201.12086): at zero and below nothing is learnt
            image_tokens = self.pipeline.encoder.vision(batch["pixel_values"])  # [B, N, image width]

        contrast, image_to_text, text_to_image = self._contrast(image_tokens, ids, attention_mask)
        generators = make_generators(batch["seeds"])
        matching = self._matching(image_tokens, ids, attention_mask, image_to_text, text_to_image, generators)
        generation = self._generation(image_tokens, ids, attention_mask)
        losses = {"contrast": contrast, "matching": matching, "generation": generation}
        own = process_index() * len(ids) + torch.arange(len(ids), device=ids.device)
        retrieval = (image_to_text.argmax(1) == own).float().mean()
        detached = {name: loss.detach() for name, loss in losses.items()}
        return {"loss": contrast + matching + generation, **detached, "retrieval": retrieval}

    def _contrast(self, image_tokens: Tensor, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, and the cosines [B, G] of images with all texts and of texts with all images."""
        queries, text = run_qformer(self.pipeline.encoder.qformer, image_tokens, ids, attention_mask, contrastive_mask)
        images = F.normalize(self.image_head(queries).float(), dim=-1)  # [B, Q, D]
        texts = F.normalize(self.text_head(text[:, 0]).float(), dim=-1)  # [B, D]
        image_to_text = query_text_similarity(images, gather_rows(texts))
        text_to_image = query_text_similarity(gather_rows(images), texts).T
        offset = process_index() * len(ids)
        loss = contrastive_loss(image_to_text, text_to_image, offset, self.temperature, self.options.smoothing)
        return loss, image_to_text.detach(), text_to_image.detach()

    def _matching(
        self,
        image_tokens: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        image_to_text: Tensor,
        text_to_image: Tensor,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Tell right pairs from wrong ones: each image with its own text, with a wrong one, and a wrong image."""
        offset, temperature = process_index() * len(ids), self.temperature.detach()
        wrong_text = hard_negatives(image_to_text, offset, temperature, generators)  # [B]
        wrong_image = hard_negatives(text_to_image, offset, temperature, generators)  # [B]
        all_tokens, all_ids, all_masks = (gather_rows(each) for each in (image_tokens, ids, attention_mask))
        queries, _ = run_qformer(
            self.pipeline.encoder.qformer,
            torch.cat([image_tokens, image_tokens, all_tokens[wrong_image]]),
            torch.cat([ids, all_ids[wrong_text], ids]),
            torch.cat([attention_mask, all_masks[wrong_text], attention_mask]),
            matching_mask,
        )
        logits = self.matching_head(queries).mean(dim=1).float()  # [3 B, 2]
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(logits, labels)

    def _generation(self, image_tokens: Tensor, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Predict each token of the caption; ``[DEC]`` in place of ``[CLS]`` tells the Q-Former to."""
        inputs = ids.clone()
        inputs[:, 0] = cast(int, bert_tokenizer().token_to_id(DEC_TOKEN))
        qformer = self.pipeline.encoder.qformer
        _, text = run_qformer(qformer, image_tokens, inputs, attention_mask, generation_mask)
        logits = self.word_head(text, qformer.word_embedding.weight)  # [B, T, vocabulary]
        return generation_loss(logits, ids, attention_mask, self.options.smoothing)


class WordHead(nn.Module):
    """BERT's language-modelling head, whose output weights are the word embeddings.

    Args:
        width: Width of the Q-Former.
        vocabulary_size: Number of tokens that are scored.
        layer_norm_eps: Epsilon of the layer norm.
    """

    def __init__(self, width: int, vocabulary_size: int, layer_norm_eps: float):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, text: Tensor, word_embeddings: Tensor) -> Tensor:
        """Score all tokens.

        Args:
            text: Output of the text of shape [B, T, width].
            word_embeddings: Embeddings of shape [vocabulary, width].

        Returns:
            Logits of shape [B, T, vocabulary].
        """
        return F.linear(self.norm(F.gelu(self.transform(text))), word_embeddings, self.bias)


def run_qformer(
    qformer: QFormer,
    image_tokens: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    make_mask: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Run the Q-Former on queries and text with one of the three self-attention masks.

    Args:
        qformer: Q-Former.
        image_tokens: Output of the image encoder of shape [B, N, image width].
        input_ids: BERT's tokens of shape [B, T].
        attention_mask: 1 where there is a token and 0 for padding, of shape [B, T].
        make_mask: Function of :mod:`..losses` that makes the mask of an attention mask and the number of queries.

    Returns:
        Output of the queries [B, Q, width] and of the text [B, T, width].
    """
    queries = qformer.query_tokens.to(image_tokens.dtype).expand(len(image_tokens), -1, -1)  # [B, Q, width]
    text = qformer.embed_text(input_ids, image_tokens.dtype)  # [B, T, width]
    lengths = [queries.shape[1], text.shape[1]]
    queries, text = qformer.embedding_norm(torch.cat([queries, text], dim=1)).split(lengths, dim=1)
    mask = make_mask(attention_mask, lengths[0])  # [B, Q + T, Q + T]
    bias = torch.zeros(mask.shape, dtype=queries.dtype, device=mask.device)
    bias = bias.masked_fill(~mask, torch.finfo(queries.dtype).min)[:, None]  # [B, 1, Q + T, Q + T]
    for layer in qformer.layers:
        queries, text = layer(queries, text, image_tokens, bias)
    return queries, text
