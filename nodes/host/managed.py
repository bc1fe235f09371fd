"""The subject encoder under the host's memory management: what flows through a BLIP2_QFORMER socket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ...blip_qformer.checkpoint import Checkpoint, load_subject_encoder
from ...blip_qformer.encoder import SubjectEncoder, fit_mask, preprocess
from ...blip_qformer.imaging.segmentation import Segmenter
from ...blip_qformer.subject.provenance import encoder_hash

PICTURES_AT_ONCE = 8


# A picture's way through the published encoder: 257 tokens x 4096 numbers x 4 bytes, a dozen such tensors at once.
ACTIVATION_BYTES = 64 * 1024**2


class ManagedEncoder:
    """A subject encoder that the host loads when it is used and takes away when it needs the memory.

    The weights have the precision that the host's flags give text encoders; it computes in float32, as the host's
    own CLIP does. ``encoder_hash`` tells it from other encoders.
    """

    def __init__(self, checkpoint: Checkpoint):
        management = comfy.model_management
        load_device, offload_device = management.text_encoder_device(), management.text_encoder_offload_device()
        attention = comfy.ldm.modules.attention.optimized_attention_for_device(load_device, mask=True, small_input=True)
        encoder = load_subject_encoder(
            checkpoint,
            dtype=management.text_encoder_dtype(load_device),
            device=offload_device,
            operations=comfy.ops.manual_cast,
            attention=attention,
        )
        self.patcher = comfy.model_patcher.ModelPatcher(encoder, load_device=load_device, offload_device=offload_device)
        self.encoder_hash = encoder_hash(checkpoint.encoder_state_dict)  # of the file's values, whatever the cast above

    @property
    def encoder(self) -> SubjectEncoder:
        return self.patcher.model

    def encode(self, images: Tensor, word: str, preprocessing: str, mask: Tensor | None = None) -> Tensor:
        """Pictures [B, H, W, C] of what ``word`` names -> vectors [B, 16, 768], with a progress bar and cancellable.

        Raises:
            ValueError: see ``preprocess`` and ``tokenize_subjects``.
        """
        size = self.encoder.config.vision.image_size
        mask = None if mask is None else fit_mask(mask, images)
        at_once = min(len(images), PICTURES_AT_ONCE)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=at_once * ACTIVATION_BYTES)
        progress = comfy.utils.ProgressBar(len(images))
        vectors = []
        for begin in range(0, len(images), PICTURES_AT_ONCE):
            comfy.model_management.throw_exception_if_processing_interrupted()
            chosen = slice(begin, begin + PICTURES_AT_ONCE)
            pixel_values = preprocess(images[chosen], preprocessing, None if mask is None else mask[chosen], size)
            vectors.append(self._look(pixel_values, [word] * len(pixel_values)))
            progress.update(len(pixel_values))
        return torch.cat(vectors)

    def look(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """A few pictures [B, H, W, C], each asked about a word of its own -> [B, 16, 768], without a progress bar."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=len(images) * ACTIVATION_BYTES)
        return self._look(preprocess(images, size=self.encoder.config.vision.image_size), words)

    def _look(self, pixel_values: Tensor, words: Sequence[str]) -> Tensor:
        """[B, 3, 224, 224] -> [B, 16, 768]"""
        seen = self.encoder(pixel_values.to(self.patcher.load_device, torch.float32), list(words))
        return seen.to(comfy.model_management.intermediate_device())


class ManagedSegmenter:
    """A CLIPSeg that the host loads when it is used and takes away when it needs the memory."""

    def __init__(self, folder: Path) -> None:
        management = comfy.model_management
        self.patcher = comfy.model_patcher.ModelPatcher(
            Segmenter(folder),
            load_device=management.text_encoder_device(),
            offload_device=management.text_encoder_offload_device(),
        )

    def __call__(self, picture: Tensor, word: str) -> Tensor:
        """Where in a picture [H, W, 3] that is what the word names; probabilities [H, W]."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.model(picture[None], word)[0]
