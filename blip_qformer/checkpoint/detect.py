"""What a file of tensors is, told by the names of its tensors and never by its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from enum import Enum


class Kind(Enum):
    """The files that BLIP-Diffusion is published in; the values are for people."""

    QFORMER = "a BLIP-2 Q-Former with its image encoder and projection"
    ORIGINAL_QFORMER = "the Q-Former of an original BLIP-Diffusion folder"
    PROJECTION = "the projection of an original BLIP-Diffusion folder"
    FINETUNED = "a fine-tuned BLIP-Diffusion checkpoint"
    UNET = "a diffusers U-Net"
    CONTROLNET = "a diffusers ControlNet"
    VAE = "a diffusers VAE"
    TEXT_ENCODER = "a CLIP text encoder"
    SUBJECT = "a tuned subject"


_PUBLISHED: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.QFORMER, ("query_tokens", "visual_encoder.embeddings.class_embedding")),
    (Kind.ORIGINAL_QFORMER, ("query_tokens", "Qformer.bert.embeddings.word_embeddings.weight")),
    (Kind.PROJECTION, ("dense1.weight", "dense2.weight", "LayerNorm.weight")),
    (Kind.FINETUNED, ("blip.query_tokens", "proj_layer.dense1.weight")),
    (Kind.CONTROLNET, ("controlnet_cond_embedding.conv_in.weight",)),
    (Kind.UNET, ("conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight")),
    (Kind.VAE, ("encoder.conv_in.weight", "decoder.conv_in.weight")),
    (Kind.TEXT_ENCODER, ("text_model.embeddings.token_embedding.weight",)),
    (Kind.TEXT_ENCODER, ("embeddings.token_embedding.weight", "final_layer_norm.weight")),  # without outer name
    (Kind.SUBJECT, ("ctx_embeddings_cache",)),
)


_STRANGERS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("a LoRA", lambda name: any(part in name for part in ("lora_up", "lora_down", "lora_A", "lora_B"))),
    ("an SDXL checkpoint", lambda name: name.startswith("conditioner.embedders.")),
    ("a Stable Diffusion checkpoint", lambda name: name.startswith("model.diffusion_model.")),
    ("a Flux or similar transformer", lambda name: name.startswith(("double_blocks.", "transformer_blocks."))),
    ("a BLIP-2 captioning model", lambda name: name.startswith("language_model.")),
    ("a CLIP vision model", lambda name: name.startswith("vision_model.")),
    ("a textual-inversion embedding", lambda name: name in ("emb_params", "clip_l", "string_to_param")),
)


def detect_kind(names: Collection[str]) -> Kind | None:
    """The kind of file that holds tensors of these names, or None for a stranger."""
    return next((kind for kind, signature in _PUBLISHED if all(name in names for name in signature)), None)


def describe(names: Iterable[str]) -> str:
    """In words what a file of tensors is, as far as its names tell."""
    names = list(names)
    if kind := detect_kind(names):
        return kind.value
    for description, belongs in _STRANGERS:
        if any(belongs(name) for name in names):
            return description
    return f'an unknown model ({len(names)} tensors, the first is "{min(names)}")'
