"""Whether a model's weights are copied out of the file that they were mapped from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...blip_qformer.checkpoint.weights import detach_from_file
from .versions import is_dynamic


def detach_static_model(patcher: ModelPatcher, mapped: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Copy a model's weights out of its file, one by one, unless its memory is dynamic.

    Dynamic weights stay the mapped file, as they do with the host's own loaders: the host fetches them from there when
    a layer runs, and casts them, so that copies would be the only thing that fills the main memory.

    Args:
        patcher: Model that was just loaded, with the file's tensors or with copies of them.
        mapped: Tensors of the file, or views of them.
        dtype: Precision that copies get, on the model's offload device; None leaves both as they are.
    """
    if is_dynamic(patcher):
        return
    if dtype is not None:
        patcher.model.to(patcher.offload_device, dtype)
    detach_from_file(patcher.model, mapped)
