"""Refusals of models and inputs that a node cannot work with, each in one sentence."""

from __future__ import annotations

import comfy.model_sampling
import comfy.sd
import comfy.supported_models
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...blip_qformer.checkpoint import Checkpoint
from ...blip_qformer.subject import Subject

CLIP_L = "l"  # the host's name for SD1.5's text encoder among a CLIP's encoders

ENCODER_NAMES = {CLIP_L: "CLIP-L", "g": "CLIP-G", "h": "CLIP-H", "t5xxl": "T5-XXL"}


def require_sd15(model: ModelPatcher) -> None:
    """Refuse to edit the attention of a model other than SD1.5.

    Args:
        model: Model that a sampler is about to run.

    Raises:
        ValueError: The model is of another kind.
    """
    config = model.model.model_config
    if not isinstance(config, comfy.supported_models.SD15):
        raise ValueError(
            f"This model is {type(config).__name__}, but Attention Re-weight Edit, Prompt-to-Prompt Edit and "
            "Subject Regions work on SD1.5's U-Net: connect an SD1.5 model, or take the edit out."
        )


def require_cross_attention(model: ModelPatcher) -> None:
    """Refuse to record the attention of a model that has no cross-attention.

    Args:
        model: Model that a sampler is about to run.

    Raises:
        ValueError: The model is not a U-Net.
    """
    if not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            f"This model is of the kind {type(model.model).__name__}, in which words are not looked at through "
            "cross-attention: use an SD1.5 model, or take Record Attention out."
        )


def require_additive_noise(model: ModelPatcher) -> None:
    """Refuse a model whose noisy latent is not the clean latent plus sigma times noise.

    Args:
        model: Model to invert or to fine-tune.

    Raises:
        ValueError: The model interpolates between latent and noise, as flow models do.
    """
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.EPS):
        raise ValueError(
            f"This model is of the kind {type(model.model).__name__}, whose sampling throws the latent away when it "
            "starts, so that nothing drawn from an inverted one comes back: use SD1.5, SD2 or SDXL."
        )


def require_plain_sd15(model: ModelPatcher) -> None:
    """Refuse to fine-tune a model other than SD1.5, or an SD1.5 that reads more than the noisy latent.

    Args:
        model: Model to fine-tune.

    Raises:
        ValueError: The model is of another kind, or its U-Net also reads a mask or an image, as those for inpainting
            and InstructPix2Pix do.
    """
    config = model.model.model_config
    if not isinstance(config, comfy.supported_models.SD15):
        raise ValueError(
            f"This model is {type(config).__name__}, but a subject is fine-tuned with SD1.5's U-Net: connect a plain "
            "SD1.5 model."
        )
    expected = model.get_model_object("latent_format").latent_channels
    channels = model.model.diffusion_model.in_channels
    if channels != expected:
        raise ValueError(
            f"This model's U-Net reads {channels} channels, as inpainting and InstructPix2Pix models do, and "
            f"fine-tuning gives it the {expected} of a latent: connect a plain SD1.5 model."
        )


def require_same_latents(vae: comfy.sd.VAE, model: ModelPatcher) -> None:
    """Refuse a VAE whose latents have another number of channels than the model's.

    Args:
        vae: VAE of the host.
        model: Model that its latents are for.

    Raises:
        ValueError: The numbers differ.
    """
    expected = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != expected:
        raise ValueError(
            f"This VAE's latents have {vae.latent_channels} channels and this model reads {expected}: connect the VAE "
            "of the same checkpoint."
        )


def require_clip_l(clip: comfy.sd.CLIP | None, width: int) -> None:
    """Refuse a text encoder that a subject's vectors were not made for.

    Args:
        clip: Text encoder; None where a checkpoint has none.
        width: Width of the subject's vectors.

    Raises:
        ValueError: There is no CLIP, it is not SD1.5's, or its embeddings have another width than the vectors.
    """
    if clip is None:
        raise ValueError(
            "The clip input is empty, because the checkpoint it comes from has no text encoder: connect the CLIP of "
            "Load BLIP-Diffusion."
        )
    if other := _encoders_if_not_clip_l(clip):
        raise ValueError(
            f"This CLIP is {other}, but a subject's vectors are words for CLIP-L, the text encoder of SD1.5: connect "
            "the CLIP of Load BLIP-Diffusion."
        )
    found_width = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight.shape[-1]
    if found_width != width:
        raise ValueError(
            f"This CLIP's words are {found_width} numbers wide and the subject's vectors {width}: connect the CLIP "
            "that belongs to the Q-Former, from the same Load BLIP-Diffusion."
        )


def require_clip_l_for_edits(clip: comfy.sd.CLIP) -> None:
    """Refuse a text encoder whose tokens are not those of the prompts that attention edits work on.

    Args:
        clip: Text encoder that a stock conditioning was encoded with.

    Raises:
        ValueError: The CLIP is not SD1.5's.
    """
    if other := _encoders_if_not_clip_l(clip):
        raise ValueError(
            f"This CLIP is {other}, but attention is edited in SD1.5, whose text encoder is CLIP-L: connect an SD1.5 "
            "clip."
        )


def require_in_order(*subjects: Subject | None) -> list[Subject]:
    """Refuse a gap among a node's subjects, behind which one would count as its neighbour.

    Args:
        subjects: Subjects in the order of the sockets; None for a socket with nothing connected.

    Returns:
        The connected subjects.

    Raises:
        ValueError: The third socket is empty and the fourth is not.
    """
    connected = [subject for subject in subjects if subject is not None]
    if any(subject is None for subject in subjects[: len(connected)]):
        raise ValueError("subject_4 is connected and subject_3 is not: connect the subjects in order.")
    return connected


def require_tuned_subject(checkpoint: Checkpoint) -> Tensor:
    """Refuse a checkpoint that was not tuned on a subject.

    Args:
        checkpoint: Opened checkpoint.

    Returns:
        The subject's vectors of shape [1, 16, width].

    Raises:
        ValueError: The checkpoint holds no subject.
    """
    if checkpoint.subject is None:
        raise ValueError(
            f"{checkpoint.path} holds no tuned subject: choose a checkpoint that was tuned on one, or make a subject "
            "of a picture with BLIP-2 Subject Encode."
        )
    return checkpoint.subject


def _encoders_if_not_clip_l(clip: comfy.sd.CLIP) -> str:
    """Names of a CLIP's text encoders, such as ``CLIP-G + CLIP-L``; empty where CLIP-L is the only one."""
    encoders: set[str] = set(clip.tokenize(""))
    return "" if encoders == {CLIP_L} else " + ".join(sorted(ENCODER_NAMES.get(name, name) for name in encoders))
