"""The models that fine-tuning may work on: the host's own where it can borrow them, else copies that are freed again.

Where the host's memory is dynamic, weights come to the card when a layer runs and may leave it before the backward pass
needs them. So fine-tuning reads the model and the text encoder once more from their file, as plain models with the same
patches. Elsewhere it borrows: a copy would cost the memory of a whole model and protect nothing, as borrowed weights
are only seen through, and never written to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from .versions import is_dynamic, static_copy

GIGABYTE = 1024**3

log = logging.getLogger("blip_diffusion")


@contextmanager
def training_models(model: ModelPatcher, clip: comfy.sd.CLIP) -> Iterator[tuple[ModelPatcher, comfy.sd.CLIP]]:
    """Give a model and a text encoder whose weights stay in place while they are loaded.

    Args:
        model: Model, with the patches that are to count.
        clip: Text encoder, likewise.

    Yields:
        Each of the two itself, or a copy of its own where its memory is dynamic. Copies are freed afterwards.

    Raises:
        ValueError: A copy is needed, and there is too little memory for it or no way to make it.
    """
    dynamic = [patcher for patcher in (model, clip.patcher) if is_dynamic(patcher)]
    if not dynamic:
        log.info("Fine-tuning works on the model in memory, whose weights stay as they are.")
        yield model, clip
        return
    size = sum(patcher.model_size() for patcher in dynamic)
    require_copies(dynamic, size)
    log.info(
        "Fine-tuning works on a copy of the model (%.1f GB), because this ComfyUI loads weights while they are used "
        "(dynamic VRAM). The copy is freed afterwards.",
        size / GIGABYTE,
    )
    copies: list[ModelPatcher] = []
    try:
        if is_dynamic(model):
            model = static_copy(model)
            copies.append(model)
        if is_dynamic(clip.patcher):
            clip = _static_text_encoder(clip)
            copies.append(clip.patcher)
        yield model, clip
    finally:
        for copy in copies:
            copy.detach()  # takes its weights off the card, whatever else still holds the copy


def require_copies(patchers: list[ModelPatcher], size: int) -> None:
    """Refuse to copy what cannot be copied.

    Args:
        patchers: Dynamic models to copy.
        size: Bytes of the copies.

    Raises:
        ValueError: A model does not know the file that it comes from, or there is too little main memory.
    """
    if any(getattr(patcher, "cached_patcher_init", None) is None for patcher in patchers):
        raise ValueError(
            "Fine-tuning needs a copy of the model and of its CLIP, because this ComfyUI loads weights while they are "
            "used, and the loader of one of them does not say how it is loaded again: use Load BLIP-Diffusion or Load "
            "Checkpoint, or start ComfyUI with --disable-dynamic-vram."
        )
    free = cast(int, comfy.model_management.get_free_memory(torch.device("cpu")))
    if size > free:
        raise ValueError(
            f"Fine-tuning needs {size / GIGABYTE:.1f} GB of main memory for a copy of the model, because this ComfyUI "
            f"loads weights while they are used, and {free / GIGABYTE:.1f} GB are free: close other programs, or start "
            "ComfyUI with --disable-dynamic-vram."
        )


def _static_text_encoder(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """Copy a text encoder likewise; the host's ``CLIP.clone`` would go on running the weights of the one copied."""
    copy = clip.clone()
    copy.patcher = static_copy(clip.patcher)
    copy.cond_stage_model = copy.patcher.model
    return copy


def room_beside(model: ModelPatcher, clip: comfy.sd.CLIP) -> int:
    """Return how many bytes a device has for training beside these two, when everything else has left it.

    Args:
        model: Model that the host was given, loaded or not.
        clip: Text encoder, likewise.
    """
    management = comfy.model_management
    device, patchers = model.load_device, [model, clip.patcher]
    free = cast(int, management.get_free_memory(device))
    if management.is_device_cpu(device):  # which holds the models anyway, but not their copies
        return free - sum(patcher.model_size() for patcher in patchers if is_dynamic(patcher))
    loaded = sum(each.model_loaded_memory() for each in management.current_loaded_models if each.device == device)
    return free + loaded - sum(patcher.model_size() for patcher in patchers if patcher.load_device == device)
