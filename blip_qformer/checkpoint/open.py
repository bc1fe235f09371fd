"""A path becomes a checkpoint, whichever of the published layouts lies there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import SubjectEncoder, SubjectEncoderConfig
from ..encoder.layers import AttentionFunction, scaled_dot_product_attention
from .components import Component, find_components
from .detect import Kind, describe, detect_kind
from .infer_config import check_weights
from .layouts import hub, lavis
from .layouts.finetuned import SUBJECT, split_finetuned
from .layouts.single_file import config_of_file
from .read_tensors import CheckpointError, read_config, read_tensors

NETWORKS = {Kind.UNET, Kind.TEXT_ENCODER, Kind.VAE, Kind.CONTROLNET}


ENCODER_FOLDERS = ("qformer", "blip_model")  # in a Hub folder, in an original folder


CONTEXT_POSITION = 2  # where the vectors go in every published model: after <bos> and "a"


@dataclass(frozen=True)
class Checkpoint:
    """An opened BLIP-Diffusion checkpoint; weights are memory-mapped, so opening costs next to nothing.

    ``encoder_weights`` are in the subject encoder's own names; the other parts keep diffusers' names.
    """

    path: Path
    format: str
    encoder_weights: dict[str, Tensor]
    encoder_config: SubjectEncoderConfig
    encoder_path: Path
    unet: Component | None = None
    text_encoder: Component | None = None
    vae: Component | None = None
    controlnet: Component | None = None
    subject: Tensor | None = None
    problems: tuple[str, ...] = field(default=(), repr=False)

    def require(self, part: str, *advice: str) -> Component:
        """The named part.

        Args:
            advice: further sentences for who does not find it.

        Raises:
            CheckpointError: this checkpoint does not have it.
        """
        found = getattr(self, part)
        if found is None:
            missing = (
                f"{self.path} ({self.format}) has no {part.replace('_', ' ')}: choose a whole BLIP-Diffusion folder."
            )
            raise CheckpointError(" ".join([missing, *advice, *self.problems]))
        return found


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hub folder, an original (LAVIS) folder, a fine-tuned file, or a Q-Former in one file.

    Raises:
        CheckpointError: there is nothing, or something else, or it is not whole.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    weights = read_tensors(path)
    kind = detect_kind(weights)
    if kind is Kind.QFORMER:
        return _open_single_file(path, weights)
    if kind is Kind.FINETUNED:
        return _open_finetuned(path, weights)
    if kind in (Kind.ORIGINAL_QFORMER, Kind.PROJECTION, Kind.UNET, Kind.VAE, Kind.TEXT_ENCODER):
        raise CheckpointError(f"{path} is {kind.value}, one part of a checkpoint: choose the folder it belongs to.")
    raise CheckpointError(
        f"{path} is {describe(weights)}, not BLIP-Diffusion: choose a Salesforce/blipdiffusion folder, an original "
        "(LAVIS) folder, a fine-tuned .pth, or a blip2_qformer.safetensors."
    )


def _open_folder(folder: Path) -> Checkpoint:
    parts, problems = find_components(folder)
    if Kind.QFORMER in parts:
        part = parts[Kind.QFORMER]
        if not NETWORKS & parts.keys() and not problems:  # only our own file lies there
            return open_checkpoint(part.path)
        _check_pipeline(folder)
        weights = hub.NAMES.to_encoder(part.weights, part.path)
        config, format, table = config_of_file(weights, part.path), "Hub folder", hub.NAMES
    elif Kind.ORIGINAL_QFORMER in parts and Kind.PROJECTION in parts:
        part = parts[Kind.ORIGINAL_QFORMER]
        weights, config = lavis.encoder_from_lavis(part.weights, parts[Kind.PROJECTION].weights, part.path)
        format, table = "original (LAVIS) folder", lavis.NAMES
    elif Kind.FINETUNED in parts:
        return open_checkpoint(parts[Kind.FINETUNED].path)
    elif len(inner := [path for name in ENCODER_FOLDERS for path in folder.glob(f"*/{name}")]) == 1:
        return _open_folder(inner[0].parent)  # an archive unpacked into a folder of its own name
    else:
        found = "; ".join(f"{part.path.relative_to(folder)} is {kind.value}" for kind, part in parts.items())
        message = (
            f"{folder} holds no whole BLIP-Diffusion checkpoint ({found or 'no weights of it were found'}): "
            "download Salesforce/blipdiffusion, or unpack an original archive, as a whole into this folder."
        )
        raise CheckpointError(" ".join([message, *problems]))
    check_weights(weights, config, table, part.path)
    tuned = parts.get(Kind.SUBJECT)
    return Checkpoint(
        folder,
        format,
        weights,
        config,
        part.path,
        unet=parts.get(Kind.UNET),
        text_encoder=parts.get(Kind.TEXT_ENCODER),
        vae=parts.get(Kind.VAE),
        controlnet=parts.get(Kind.CONTROLNET),
        subject=tuned.weights[SUBJECT] if tuned else None,
        problems=tuple(problems),
    )


def _open_single_file(path: Path, weights: dict[str, Tensor]) -> Checkpoint:
    renamed = hub.NAMES.to_encoder(weights, path)
    config = config_of_file(renamed, path)
    check_weights(renamed, config, hub.NAMES, path)
    return Checkpoint(path, "BLIP-2 Q-Former file", renamed, config, path)


def _open_finetuned(path: Path, weights: dict[str, Tensor]) -> Checkpoint:
    parts = split_finetuned(weights)
    renamed, config = lavis.encoder_from_lavis(parts["qformer"], parts["projection"], path)
    check_weights(renamed, config, lavis.NAMES, path)
    networks = {
        name: Component(path, {}, lambda name=name: split_finetuned(read_tensors(path))[name])
        for name in ("unet", "text_encoder", "vae")
        if parts[name]
    }
    return Checkpoint(path, "fine-tuned file", renamed, config, path, subject=weights.get(SUBJECT), **networks)


def _check_pipeline(folder: Path) -> None:
    position = read_config(folder, "model_index.json").get("ctx_begin_pos", CONTEXT_POSITION)
    if position != CONTEXT_POSITION:
        raise CheckpointError(
            f"{folder / 'model_index.json'} puts the subject at position {position} of the prompt, but BLIP-Diffusion "
            f"was trained with {CONTEXT_POSITION}: use the published model_index.json."
        )


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
