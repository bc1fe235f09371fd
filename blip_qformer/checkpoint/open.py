"""Open a checkpoint in any of the published layouts, and load the subject encoder from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import SubjectEncoder, SubjectEncoderConfig
from ..encoder.layers import AttentionFunction, scaled_dot_product_attention
from ..plain_data import shown
from ..prompt import SUBJECT_INDEX
from .components import SHARD, Component, find_components, has_encoder_folder, is_component_folder
from .detect import Kind, describe, detect_kind
from .hub_cache import snapshot_folder
from .infer_config import check_state_dict
from .layouts import finetuned, hub, lavis
from .layouts.single_file import config_from_file
from .read_tensors import CheckpointError, naming_file, read_config, read_tensors
from .weights import check_finite

NETWORKS = {
    "unet": Kind.UNET,
    "text_encoder": Kind.TEXT_ENCODER,
    "vae": Kind.VAE,
    "controlnet": Kind.CONTROLNET,
}
FRAGMENTS = (Kind.ORIGINAL_QFORMER, Kind.PROJECTION, Kind.UNET, Kind.VAE, Kind.TEXT_ENCODER)
CONTEXT_POSITION = 1 + SUBJECT_INDEX  # of the subject's vectors in every published model, <bos> counted too


@dataclass(frozen=True)
class Checkpoint:
    """An opened BLIP-Diffusion checkpoint. Weights are memory-mapped, so opening is cheap; keep it while loading only.

    Args:
        path: The folder or file.
        format: The name of its layout, for people.
        encoder_state_dict: The subject encoder's weights, in the keys of ``SubjectEncoder.state_dict()``.
        encoder_config: The subject encoder's sizes.
        encoder_path: The file that holds the subject encoder.
        unet: The U-Net, in diffusers' keys; None if the checkpoint has none.
        text_encoder: The CLIP text model, likewise.
        vae: The VAE, likewise.
        controlnet: The ControlNet, likewise.
        subject: Vectors [1, 16, 768] of a tuned subject; None if the checkpoint has none.
        problems: A sentence for each file that could not be read.
    """

    path: Path
    format: str
    encoder_state_dict: dict[str, Tensor]
    encoder_config: SubjectEncoderConfig
    encoder_path: Path
    unet: Component | None = None
    text_encoder: Component | None = None
    vae: Component | None = None
    controlnet: Component | None = None
    subject: Tensor | None = None
    problems: tuple[str, ...] = field(default=(), repr=False)

    def copy_encoder_weights(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Copy the subject encoder's weights, one by one, so that they no longer depend on the file.

        Args:
            dtype: The dtype to cast them to; None keeps the file's.
            device: The device to copy them to.

        Returns:
            The weights, in the keys of ``SubjectEncoder.state_dict()``.

        Raises:
            CheckpointError: A weight holds NaN or infinity, cast to the dtype.
        """
        weights = {key: tensor.to(device, dtype, copy=True) for key, tensor in self.encoder_state_dict.items()}
        check_finite(weights, self.encoder_path)
        return weights

    def require(self, name: str, *advice: str) -> Component:
        """Return a component.

        Args:
            name: ``unet``, ``text_encoder``, ``vae`` or ``controlnet``.
            advice: Further sentences for the error, where no file is at fault.

        Returns:
            The component.

        Raises:
            CheckpointError: This checkpoint does not have the component.
        """
        component = getattr(self, name)
        if component is None:
            missing = f"{self.path} ({self.format}) has no {name.replace('_', ' ')}"
            if self.problems:  # which are likely why, and each says what to do
                raise CheckpointError(" ".join([f"{missing} that can be read.", *self.problems]))
            raise CheckpointError(" ".join([f"{missing}: choose a whole BLIP-Diffusion folder.", *advice]))
        return component


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hub folder, an original (LAVIS) folder, a fine-tuned file, or a Q-Former in one file.

    Args:
        path: The folder or file; of the Hub's cache, the folder ``models--<owner>--<name>`` does as well as a snapshot.

    Returns:
        The opened checkpoint.

    Raises:
        CheckpointError: There is nothing, or something else, or it is incomplete.
    """
    path = Path(path)
    with naming_file(path):
        path = snapshot_folder(path)
        return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    """Open a file by the tensors that it holds."""
    tensors = read_tensors(path)
    kind = detect_kind(tensors)
    if kind is Kind.QFORMER:
        return _open_qformer_file(path, tensors)
    if kind is Kind.FINETUNED:
        return _open_finetuned_file(path, tensors)
    if kind in FRAGMENTS:
        raise CheckpointError(f"{path} is {kind.value}, one part of a checkpoint: choose the folder it belongs to.")
    raise CheckpointError(
        f"{path} is {describe(tensors)}, not BLIP-Diffusion: choose a Salesforce/blipdiffusion folder, an original "
        "(LAVIS) folder, a fine-tuned .pth, or a blip2_qformer.safetensors."
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
        path: A Hub folder, an original (LAVIS) folder, a fine-tuned file or a Q-Former in one file; or one of those,
            opened.
        dtype: The dtype to cast the weights to; None keeps the file's.
        device: The device of the weights.
        operations: The namespace that layers come from, see :class:`~blip_qformer.encoder.SubjectEncoder`.
        attention: The attention function, see :data:`~blip_qformer.encoder.layers.AttentionFunction`.

    Returns:
        The encoder in evaluation mode, with frozen weights in memory of their own: its file may be replaced.

    Raises:
        CheckpointError: See :func:`open_checkpoint`; or the weights hold NaN or infinity, cast to the dtype.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    # Built without memory and then given copies of the file's tensors, made one by one: there are never two.
    encoder = SubjectEncoder(checkpoint.encoder_config, dtype, "meta", operations, attention)
    encoder.load_state_dict(checkpoint.copy_encoder_weights(dtype, device), strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def _open_folder(folder: Path) -> Checkpoint:
    """Open a folder by what its files hold."""
    components, problems = find_components(folder)
    if Kind.QFORMER in components and not _is_lavis_beside_a_file(folder, components):
        path = components[Kind.QFORMER].path
        is_alone = not components.keys() & {*NETWORKS.values()} and not problems
        if is_alone and not SHARD.search(path.name):  # the only file of a model there
            return open_checkpoint(path)
        return _open_hub_folder(folder, components, problems)
    if {Kind.ORIGINAL_QFORMER, Kind.PROJECTION} <= components.keys():
        return _open_lavis_folder(folder, components, problems)
    if Kind.FINETUNED in components:
        return open_checkpoint(components[Kind.FINETUNED].path)
    inner = [path for path in map(snapshot_folder, folder.glob("*")) if has_encoder_folder(path)]
    if len(inner) == 1 and not any(is_component_folder(path) for path in folder.glob("*")):
        return _open_folder(inner[0])  # such as an archive unpacked into a folder of its own name
    found = "; ".join(f"{each.path.relative_to(folder)} is {kind.value}" for kind, each in components.items())
    message = f"{folder} holds no whole BLIP-Diffusion checkpoint ({found or 'no weights of it were found'})"
    if problems:
        raise CheckpointError(" ".join([f"{message}.", *problems]))
    raise CheckpointError(
        f"{message}: download Salesforce/blipdiffusion, or unpack an original archive, as a whole into this folder."
    )


def _is_lavis_beside_a_file(folder: Path, components: Mapping[Kind, Component]) -> bool:
    """Return whether an original folder is whole, and the Hub's Q-Former is only a file that lies beside its parts."""
    is_whole = {Kind.ORIGINAL_QFORMER, Kind.PROJECTION} <= components.keys()
    return is_whole and components[Kind.QFORMER].path.parent == folder


def _open_hub_folder(folder: Path, components: Mapping[Kind, Component], problems: Sequence[str]) -> Checkpoint:
    position = read_config(folder, "model_index.json").get("ctx_begin_pos", CONTEXT_POSITION)
    if position != CONTEXT_POSITION:
        raise CheckpointError(
            f"{folder / 'model_index.json'} puts the subject at position {shown(position)} of the prompt, but "
            f"BLIP-Diffusion was trained with {CONTEXT_POSITION}: use the published model_index.json."
        )
    path = components[Kind.QFORMER].path
    state_dict = hub.KEY_MAP.to_encoder(components[Kind.QFORMER].state_dict(), path)
    config = config_from_file(state_dict, path)
    check_state_dict(state_dict, config, hub.KEY_MAP, path)
    return Checkpoint(folder, "Hub folder", state_dict, config, path, **_other_components(components, problems))


def _open_lavis_folder(folder: Path, components: Mapping[Kind, Component], problems: Sequence[str]) -> Checkpoint:
    qformer, projection = components[Kind.ORIGINAL_QFORMER], components[Kind.PROJECTION]
    state_dict, config = lavis.encoder_from_lavis(qformer.state_dict(), projection.state_dict(), qformer.path)
    check_state_dict(state_dict, config, lavis.KEY_MAP, qformer.path)
    others = _other_components(components, problems)
    return Checkpoint(folder, "original (LAVIS) folder", state_dict, config, qformer.path, **others)


def _other_components(components: Mapping[Kind, Component], problems: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a :class:`Checkpoint` that both kinds of folder fill alike."""
    tuned = components.get(Kind.SUBJECT)
    return {
        **{name: components.get(kind) for name, kind in NETWORKS.items()},
        "subject": tuned.state_dict()[finetuned.SUBJECT_KEY].clone() if tuned else None,
        "problems": tuple(problems),
    }


def _open_qformer_file(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    state_dict = hub.KEY_MAP.to_encoder(tensors, path)
    config = config_from_file(state_dict, path)
    check_state_dict(state_dict, config, hub.KEY_MAP, path)
    return Checkpoint(path, "BLIP-2 Q-Former file", state_dict, config, path)


def _open_finetuned_file(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    state_dicts = finetuned.split_finetuned(tensors)
    state_dict, config = lavis.encoder_from_lavis(state_dicts["qformer"], state_dicts["projection"], path)
    check_state_dict(state_dict, config, lavis.KEY_MAP, path)

    def component(name: str) -> Component | None:
        if not state_dicts[name]:
            return None
        return Component(path, {}, lambda: finetuned.split_finetuned(read_tensors(path))[name])

    return Checkpoint(
        path,
        "fine-tuned file",
        state_dict,
        config,
        path,
        unet=component("unet"),
        text_encoder=component("text_encoder"),
        vae=component("vae"),
        subject=tensors[finetuned.SUBJECT_KEY].clone() if finetuned.SUBJECT_KEY in tensors else None,
    )
