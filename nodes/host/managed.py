"""Our models under the host's memory management: loaded when they are used, unloaded when memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...blip_qformer.checkpoint import Checkpoint, open_checkpoint
from ...blip_qformer.checkpoint.weights import check_finite
from ...blip_qformer.encoder import SubjectEncoder, fit_mask, preprocess
from ...blip_qformer.encoder.preprocessing import PreprocessingMode, to_squares
from ...blip_qformer.imaging.segmentation import Segmenter
from ...blip_qformer.subject import Subject
from ...blip_qformer.subject.preview import EDGE, MAX_TILES, make_preview
from ...blip_qformer.subject.provenance import encoder_hash, image_hash
from .lists import match_masks, merge_batches
from .mapped_weights import detach_static_model
from .versions import archive_dtypes, patcher_class, remember_loader

MAX_BATCH_SIZE = 8

# Of one image in the published encoder: 257 tokens x 4096 numbers x 4 bytes, a dozen such tensors at once.
ACTIVATION_BYTES = 64 * 1024**2


def build_encoder(checkpoint: Checkpoint, disable_dynamic: bool = False) -> ModelPatcher:
    """Build a subject encoder under memory management.

    All its layers are the host's own, which fetch their weights. Three parameters belong to no layer (class and
    position embedding, query tokens): the host moves those when it loads the model, and the encoder moves them again to
    where its input is.

    Args:
        checkpoint: Opened checkpoint.
        disable_dynamic: Whether its memory must not be dynamic, whatever the host does.

    Raises:
        CheckpointError: See :func:`~...blip_qformer.checkpoint.open_checkpoint`.
    """
    management = comfy.model_management
    load_device, offload_device = management.text_encoder_device(), management.text_encoder_offload_device()
    dtype = management.text_encoder_dtype(load_device)
    attention = comfy.ldm.modules.attention.optimized_attention_for_device(load_device, mask=True, small_input=True)
    # Built without memory and then given the file's tensors, which are copied one by one: there are never two.
    encoder = SubjectEncoder(checkpoint.encoder_config, dtype, "meta", comfy.ops.manual_cast, attention)
    archive_dtypes(encoder)
    patcher = patcher_class(disable_dynamic)(encoder, load_device=load_device, offload_device=offload_device)
    encoder.load_state_dict(checkpoint.encoder_state_dict, assign=True)
    detach_static_model(patcher, checkpoint.encoder_state_dict.values(), dtype)
    check_finite(encoder.state_dict(), checkpoint.encoder_path)  # after the cast, which may overflow
    encoder.eval().requires_grad_(False)
    remember_loader(patcher, _rebuild_encoder, checkpoint.path)
    return patcher


def _rebuild_encoder(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    return build_encoder(open_checkpoint(path), disable_dynamic)


class ManagedEncoder:
    """A subject encoder under memory management, which flows through BLIP2_QFORMER sockets.

    The weights have the precision that the host's flags give text encoders; it computes in float32, as the host's
    own CLIP does.

    Args:
        checkpoint: Opened checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.patcher = build_encoder(checkpoint)
        self.encoder_hash = encoder_hash(checkpoint.encoder_state_dict)  # of the file's values, whatever the cast above

    @property
    def encoder(self) -> SubjectEncoder:
        """The encoder itself, wherever its weights are at the moment."""
        return self.patcher.model

    def encode(
        self,
        batches: Sequence[Tensor],
        word: str,
        preprocessing: PreprocessingMode,
        masks: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Encode images of one subject, with a progress bar; can be cancelled.

        Args:
            batches: Images in batches of shape [B, H, W, C] in 0..1, each of a size of its own.
            word: What the images show.
            preprocessing: How an image becomes a square, one of ``PREPROCESSING_MODES``.
            masks: For each batch masks of shape [B, H, W] or [1, H, W], white where the subject is, or None.

        Returns:
            Subject vectors of shape [N, 16, width] of all N images.

        Raises:
            ValueError: The images, a mask or the word cannot be used.
        """
        masks = masks or [None] * len(batches)
        fitted = [None if mask is None else fit_mask(mask, images) for images, mask in zip(batches, masks, strict=True)]
        self._load(min(max(map(len, batches)), MAX_BATCH_SIZE))
        progress = comfy.utils.ProgressBar(sum(map(len, batches)))
        vectors = []
        for images, mask in zip(batches, fitted, strict=True):
            for start in range(0, len(images), MAX_BATCH_SIZE):
                comfy.model_management.throw_exception_if_processing_interrupted()
                rows = slice(start, start + MAX_BATCH_SIZE)
                pixel_values = preprocess(images[rows], preprocessing, None if mask is None else mask[rows], self._size)
                vectors.append(self._encode(pixel_values, [word] * len(pixel_values)))
                progress.update(len(pixel_values))
        return torch.cat(vectors)

    def encode_with_words(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """Encode a few images, each with a word of its own, without a progress bar.

        Args:
            images: Images of shape [B, H, W, C] in 0..1.
            words: A word for each image.

        Returns:
            Subject vectors of shape [B, 16, width].
        """
        self._load(len(images))
        return self._encode(preprocess(images, size=self._size), words)

    @property
    def _size(self) -> int:
        """Edge in pixels of the squares that the encoder reads."""
        return self.encoder.config.vision.image_size

    def _load(self, batch_size: int) -> None:
        comfy.model_management.load_models_gpu([self.patcher], memory_required=batch_size * ACTIVATION_BYTES)

    def _encode(self, pixel_values: Tensor, words: Sequence[str]) -> Tensor:
        """Run the loaded encoder, [B, 3, size, size] -> [B, 16, width]."""
        vectors = self.encoder(pixel_values.to(self.patcher.load_device, torch.float32), list(words))
        return vectors.to(comfy.model_management.intermediate_device())


def encode_views(
    qformer: ManagedEncoder,
    images: Sequence[Tensor],
    word: str,
    preprocessing: PreprocessingMode,
    masks: Sequence[Tensor] | None,
) -> Subject:
    """Encode images of one subject as they arrive from the graph.

    Args:
        qformer: Subject encoder.
        images: Images in batches of shape [B, H, W, C] in 0..1, each of a size of its own.
        word: What the images show.
        preprocessing: How an image becomes a square, one of ``PREPROCESSING_MODES``.
        masks: Masks, white where the subject is; see :func:`~.lists.match_masks`.

    Returns:
        A subject with a row for each of the N images, and a preview of what the encoder was shown.

    Raises:
        ValueError: The images, a mask or the word cannot be used.
    """
    matched = match_masks(masks, images)
    if all(mask is None for mask in matched):
        images, matched = merge_batches(images), None
    vectors = qformer.encode(images, word, preprocessing, matched)
    source = "+".join(image_hash(batch) for batch in merge_batches(images))
    return Subject(vectors, word.strip(), qformer.encoder_hash, source, _preview(images, preprocessing, matched))


def _preview(
    batches: Sequence[Tensor], preprocessing: PreprocessingMode, masks: Sequence[Tensor | None] | None
) -> bytes:
    """Make a preview of the first images, as squares that are cropped and masked as the encoder's are."""
    squares = []
    for images, mask in zip(batches, masks or [None] * len(batches), strict=True):
        first = images[:MAX_TILES]
        fitted = None if mask is None else fit_mask(mask, images)[:MAX_TILES]
        squares.append(to_squares(first, preprocessing, fitted, EDGE))
        if sum(map(len, squares)) >= MAX_TILES:
            break
    return make_preview(torch.cat(squares))


class ManagedSegmenter:
    """A CLIPSeg under memory management, and never under dynamic memory.

    transformers' layers do not fetch weights. The host's dynamic patcher would move all of them to the device when it
    loads the model, and not free them for another dynamic model: it takes such a model for one that gives memory back
    by itself. A plain patcher's weights leave the device when another model needs the room.

    Args:
        folder: Folder of the CLIPSeg, as transformers saves a model.
    """

    def __init__(self, folder: Path) -> None:
        management = comfy.model_management
        self.patcher = ModelPatcher(
            Segmenter(folder),
            load_device=management.text_encoder_device(),
            offload_device=management.text_encoder_offload_device(),
        )

    def __call__(self, image: Tensor, word: str) -> Tensor:
        """Find what a word names.

        Args:
            image: Image of shape [H, W, 3] in 0..1.
            word: What to find.

        Returns:
            Probability, at each pixel, that the word names it, [H, W].
        """
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.model(image[None], word)[0]
