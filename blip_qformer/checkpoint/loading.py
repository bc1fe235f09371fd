"""A checkpoint becomes a subject encoder that is ready to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..encoder import SubjectEncoder
from ..encoder.layers import AttentionFunction, scaled_dot_product_attention
from .opening import Checkpoint, open_checkpoint


def load_subject_encoder(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    operations: Any = nn,
    attention: AttentionFunction = scaled_dot_product_attention,
) -> SubjectEncoder:
    """Load the subject encoder of any published checkpoint.

    Args:
        path: a Hub folder, an original (LAVIS) folder, a fine-tuned file, or a Q-Former in one file; or one of those,
            opened.
        dtype: what to cast the weights to; None keeps the file's. Where nothing is to be cast, the weights on the CPU
            are the mapped file itself: nothing is copied.
        device, operations, attention: see :class:`~blip_qformer.encoder.SubjectEncoder`.
    Returns:
        The encoder in evaluation mode, its weights frozen.
    Raises:
        CheckpointError: see :func:`~blip_qformer.checkpoint.open_checkpoint`.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    # Built without memory, then given the file's tensors: at no time are there two copies.
    encoder = SubjectEncoder(checkpoint.encoder_config, dtype, "meta", operations, attention)
    weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.encoder_weights.items()}
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)
