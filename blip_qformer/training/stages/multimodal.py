"""Stage 1, multimodal representation learning (arXiv 2305.14720, section 3.1; 2301.12597, section 3.1).

The Q-Former learns to read from a picture what text says about it, by three losses at once. The image encoder is
frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.collate import Batch, multimodal_batch
from ...data.pairs import Pair
from ...encoder.qformer import QFormer
from ...encoder.tokenizer import DEC_TOKEN, bert_tokenizer
from ...pipeline.pipeline import image_size_of
from ..config import RunConfig
from ..losses import (
    contrastive_loss,
    contrastive_mask,
    gather_rows,
    generation_loss,
    generation_mask,
    hard_negatives,
    matching_mask,
    process_index,
    query_text_similarity,
)
from .base import Stage, generators

TEMPERATURES = 0.001, 0.5


class MultimodalStage(Stage):
    """Contrast, matching and generation on (photograph, caption), one Q-Former for all.

    Options:
        shared_width: of the space where pictures and texts are compared.
        smoothing: of the labels of contrast and generation.
        caption_tokens: captions are cut there, ``[CLS]`` and ``[SEP]`` included.
    """

    name = "multimodal"
    uses = ("encoder",)
    trains = ("encoder.qformer",)

    def _set(self, shared_width: int = 256, smoothing: float = 0.1, caption_tokens: int = 32) -> None:
        sizes = self.pipeline.encoder.config.qformer
        if not 3 <= caption_tokens <= sizes.text_positions:
            raise ValueError(
                f"The option caption_tokens is {caption_tokens}, but this Q-Former reads 3 to {sizes.text_positions}."
            )
        self.smoothing = smoothing
        self.image_head = nn.Linear(sizes.width, shared_width)
        self.text_head = nn.Linear(sizes.width, shared_width)
        self.matching_head = nn.Linear(sizes.width, 2)
        self.word_head = WordHead(sizes.width, sizes.vocabulary_size, sizes.layer_norm_eps)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    @classmethod
    def collate(cls, config: RunConfig) -> Callable[[Sequence[Pair]], Batch]:
        return partial(multimodal_batch, size=image_size_of(config), tokens=cls.options(config)["caption_tokens"])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURES)  # as in BLIP (arXiv 2201.12086): at zero and below nothing is learnt
            image_tokens = self.pipeline.encoder.vision(batch["pixel_values"])  # [B, N, image width]

        contrast, similarity, other = self._contrast(image_tokens, ids, attention_mask)
        matching = self._matching(image_tokens, ids, attention_mask, similarity, other, generators(batch["seeds"]))
        generation = self._generation(image_tokens, ids, attention_mask)
        pipeline = {"contrast": contrast, "matching": matching, "generation": generation}
        accuracy = (similarity.argmax(1) == self._own(similarity)).float().mean()
        return {"loss": sum(pipeline.values()), **{k: v.detach() for k, v in pipeline.items()}, "retrieval": accuracy}

    def _contrast(self, image_tokens: Tensor, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the cosines [B, G] of pictures with texts and of texts with pictures."""
        queries, text = read(self.pipeline.encoder.qformer, image_tokens, ids, attention_mask, contrastive_mask)
        pictures = F.normalize(self.image_head(queries).float(), dim=-1)  # [B, Q, D]
        texts = F.normalize(self.text_head(text[:, 0]).float(), dim=-1)  # [B, D]
        image_to_text = query_text_similarity(pictures, gather_rows(texts))
        text_to_image = query_text_similarity(gather_rows(pictures), texts).T
        first = process_index() * len(ids)
        loss = contrastive_loss(image_to_text, text_to_image, first, self.temperature, self.smoothing)
        return loss, image_to_text.detach(), text_to_image.detach()

    def _matching(
        self,
        image_tokens: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        image_to_text: Tensor,
        text_to_image: Tensor,
        sources: list[torch.Generator],
    ) -> Tensor:
        """Is this the picture of that text? Once the right pair, once a wrong text, once a wrong picture."""
        first, temperature = process_index() * len(ids), self.temperature.detach()
        wrong_text = hard_negatives(image_to_text, first, temperature, sources)
        wrong_image = hard_negatives(text_to_image, first, temperature, sources)
        all_tokens, all_ids, all_masks = (gather_rows(each) for each in (image_tokens, ids, attention_mask))
        queries, _ = read(
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
        begun = ids.clone()
        begun[:, 0] = bert_tokenizer().token_to_id(DEC_TOKEN)
        qformer = self.pipeline.encoder.qformer
        _, text = read(qformer, image_tokens, begun, attention_mask, generation_mask)
        logits = self.word_head(text, qformer.word_embedding.weight)
        return generation_loss(logits, ids, attention_mask, self.smoothing)

    def _own(self, similarity: Tensor) -> Tensor:
        first = process_index() * len(similarity)
        return torch.arange(first, first + len(similarity), device=similarity.device)


class WordHead(nn.Module):
    """BERT's language-modelling head: what the text saw -> scores of all words, with the embeddings' own weights."""

    def __init__(self, width: int, vocabulary_size: int, layer_norm_eps: float):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, text: Tensor, word_embeddings: Tensor) -> Tensor:
        """[B, T, width], [vocabulary, width] -> [B, T, vocabulary]"""
        return F.linear(self.norm(F.gelu(self.transform(text))), word_embeddings, self.bias)


def read(
    qformer: QFormer,
    image_tokens: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    visibility: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Run the Q-Former with one of the three masks.

    Returns:
        The queries' answer [B, Q, width] and the text's [B, T, width].
    """
    queries = qformer.query_tokens.to(image_tokens.dtype).expand(len(image_tokens), -1, -1)
    text = qformer.embed_text(input_ids, image_tokens.dtype)
    lengths = [queries.shape[1], text.shape[1]]
    queries, text = qformer.embedding_norm(torch.cat([queries, text], dim=1)).split(lengths, dim=1)
    mask = visibility(attention_mask, lengths[0])
    added = torch.zeros(mask.shape, dtype=queries.dtype, device=mask.device)
    added = added.masked_fill(~mask, torch.finfo(queries.dtype).min)[:, None]  # [B, 1, Q + T, Q + T]
    for layer in qformer.layers:
        queries, text = layer(queries, text, image_tokens, added)
    return queries, text
