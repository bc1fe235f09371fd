"""A BLIP-Diffusion model as networks and a tokenizer, loaded from a folder in the Hub layout.

The U-Net and the VAE are diffusers' classes; the subject encoder and the CLIP text model are this library's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from ..checkpoint import open_checkpoint
from ..checkpoint.components import Component, find_components
from ..checkpoint.detect import Kind
from ..checkpoint.ldm_keys import check_depth
from ..checkpoint.open import Checkpoint
from ..checkpoint.read_tensors import CheckpointError
from ..checkpoint.weights import check_finite
from ..encoder import SubjectEncoder
from .clip_text_model import CLIPTextModel, CLIPTextModelConfig

#: The networks beside the subject encoder, each with the kind of files that holds it.
COMPONENT_KINDS = {"text_encoder": Kind.TEXT_ENCODER, "unet": Kind.UNET, "vae": Kind.VAE}

#: Stable Diffusion 1.5's noise schedule, as diffusers' schedulers read it.
SCHEDULER_CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@dataclass(eq=False)
class Pipeline:
    """A whole BLIP-Diffusion model, its weights in float32 on the CPU unless moved.

    Args:
        encoder: The subject encoder: image and word to 16 vectors.
        text_encoder: CLIP's text model.
        unet: The denoiser.
        vae: The autoencoder of images.
        tokenizer: CLIP's tokenizer.
    """

    encoder: SubjectEncoder
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, in a fixed order."""
        return {"encoder": self.encoder, "text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    def check_widths(self) -> None:
        """Check that subject vectors, text embeddings and the U-Net's cross-attention have one width.

        Raises:
            ValueError: The widths differ.
        """
        vectors, words = self.encoder.config.qformer.width, self.text_encoder.config.width
        read = self.unet.config["cross_attention_dim"]
        if not vectors == words == read:
            raise ValueError(
                f"The Q-Former's vectors are {vectors} numbers wide, the text encoder's words {words}, and what the "
                f"U-Net reads {read}: all three must be the same."
            )


def load_pipeline(folder: Path) -> Pipeline:
    """Load a model in the Hub layout.

    Args:
        folder: The model's folder.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ~blip_qformer.checkpoint.CheckpointError: A component is missing or damaged.
        ValueError: The tokenizer's files are missing.
    """
    checkpoint = open_checkpoint(folder)
    encoder = _build_encoder(checkpoint)
    text_encoder = build_text_encoder(checkpoint.require("text_encoder"))
    unet = build_unet(checkpoint.require("unet"))
    vae = build_vae(checkpoint.require("vae"))
    return Pipeline(encoder, text_encoder, unet, vae, load_tokenizer(folder / "tokenizer"))


def load_tokenizer(folder: Path, **options: Any) -> CLIPTokenizer:
    """Load CLIP's tokenizer.

    Args:
        folder: Folder with its vocabulary.
        options: Further options of transformers' class.

    Returns:
        The tokenizer.

    Raises:
        ValueError: A file of the tokenizer is missing or damaged.
    """
    if missing := [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {missing[0]}, which CLIP's tokenizer needs: download the whole folder.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
        if not isinstance(tokenizer, CLIPTokenizer):  # for some damage transformers logs a line and returns False
            raise TypeError("its vocabulary cannot be read")
        return tokenizer
    except Exception as error:  # there is no list of what transformers raises on damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{folder} holds no whole tokenizer ({reason}): download the folder again.") from error


def replace_network(pipeline: Pipeline, name: str, folder: Path) -> None:
    """Replace one network by that of another folder, such as the U-Net by Stable Diffusion 1.5's.

    Args:
        pipeline: The model that is changed.
        name: ``encoder``, ``text_encoder``, ``unet`` or ``vae``.
        folder: A model in diffusers' layout, or the network's own folder.

    Raises:
        ValueError: There is no network of that name, or it is not in that folder.
    """
    if name == "encoder":
        pipeline.encoder = _build_encoder(open_checkpoint(folder))
        return
    if name not in COMPONENT_KINDS:
        raise ValueError(f'"{name}" is no network of the model: choose encoder, {", ".join(COMPONENT_KINDS)}.')
    found, problems = find_components(folder)
    if (kind := COMPONENT_KINDS[name]) not in found:
        raise ValueError(" ".join([f"{folder} has no {name}: name a folder in diffusers' layout.", *problems]))
    build = {"text_encoder": build_text_encoder, "unet": build_unet, "vae": build_vae}[name]
    setattr(pipeline, name, build(found[kind]))


def build_unet(component: Component) -> UNet2DConditionModel:
    """Build the U-Net from its config and its published weights.

    Args:
        component: The network's files.

    Returns:
        The network, in float32 on the CPU.

    Raises:
        ValueError: The weights do not fit the config.
    """
    return _build("unet", UNet2DConditionModel, component)


def build_text_encoder(component: Component) -> CLIPTextModel:
    """Build the CLIP text model; see :func:`build_unet`."""
    with _naming(component):
        check_depth("text_encoder", component.state_dict(), component.config)
        text_encoder = CLIPTextModel(CLIPTextModelConfig.from_hub(component.config))
        text_encoder.load_hub_state_dict(component.weights())
    return text_encoder


def build_vae(component: Component) -> AutoencoderKL:
    """Build the VAE; see :func:`build_unet`."""
    return _build("vae", AutoencoderKL, component)


def _build(name: str, network: Any, component: Component) -> Any:
    """Build a network of diffusers, after its config was compared with its weights."""
    with _naming(component):
        check_depth(name, component.state_dict(), component.config)
        built = network.from_config(component.config)
        built.load_state_dict(dict(component.weights()))
    return built


@contextmanager
def _naming(component: Component) -> Iterator[None]:
    """Name the file in whatever is raised inside: diffusers checks no values, so a wrong one can raise anything."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{component.path} does not fit its own config ({reason}): download both again.") from error


def _build_encoder(checkpoint: Checkpoint) -> SubjectEncoder:
    check_finite(checkpoint.encoder_state_dict, checkpoint.encoder_path)
    encoder = SubjectEncoder(checkpoint.encoder_config)
    encoder.load_state_dict(dict(checkpoint.encoder_state_dict))
    return encoder
