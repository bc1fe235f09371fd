"""The subject encoder: vision transformer, Q-Former and projection in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import SubjectEncoderConfig
from .layers import AttentionFunction, LayerFactory, scaled_dot_product_attention
from .projection import Projection
from .qformer import QFormer
from .tokenizer import tokenize_subjects
from .vision import VisionTransformer


class SubjectEncoder(nn.Module):
    """BLIP-Diffusion's subject encoder, (image, word) -> 16 vectors (arXiv 2305.14720, figure 2, left).

    Args:
        config: The sizes; those of the published model if None.
        dtype: The dtype of the weights. The result has the dtype of the *pixels*: with operations that cast, float16
            weights and float32 pixels compute in float32.
        device: The device of the weights.
        operations: The namespace that layers come from: ``torch.nn``, or a host's own that casts and offloads weights.
        attention: The attention function, see :data:`~blip_qformer.encoder.layers.AttentionFunction`.
    """

    def __init__(
        self,
        config: SubjectEncoderConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        attention: AttentionFunction = scaled_dot_product_attention,
    ) -> None:
        super().__init__()
        self.config = config = config or SubjectEncoderConfig()
        make = LayerFactory(dtype, device, operations, attention)
        self.vision = VisionTransformer(config.vision, make)
        self.qformer = QFormer(config.qformer, config.vision.width, make)
        self.projection = Projection(config.qformer.width, config.projection_width, config.qformer.layer_norm_eps, make)

    def forward(self, pixel_values: Tensor, words: Sequence[str]) -> Tensor:
        """Encode the subjects of a batch of images.

        Args:
            pixel_values: Images [B, 3, S, S] from :func:`~blip_qformer.encoder.preprocess`.
            words: The word for the subject of each image, B of them.

        Returns:
            Vectors [B, 16, 768], which stand in a prompt like words.

        Raises:
            ValueError: The shape is wrong, or the Q-Former cannot read a word.
        """
        size = self.config.vision.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"The subject encoder got pictures of shape {list(pixel_values.shape)}, but it reads [batch, "
                f"3, {size}, {size}]: pass them through blip_qformer.encoder.preprocess(images, size={size}) first."
            )
        if len(words) != len(pixel_values):
            raise ValueError(
                f"The subject encoder got {len(pixel_values)} pictures and {len(words)} words: give one word a picture."
            )
        input_ids, attention_mask = tokenize_subjects(words, self.config.qformer.text_positions)
        image_tokens = self.vision(pixel_values)  # [B, 257, 1024]
        device = pixel_values.device
        queries = self.qformer(image_tokens, input_ids.to(device), attention_mask.to(device))  # [B, 16, 768]
        return self.projection(queries)  # [B, 16, 768]
