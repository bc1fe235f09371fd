"""Detect what a file of tensors is, by the keys of its tensors and never by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from enum import Enum


class Kind(Enum):
    """The kinds of file that BLIP-Diffusion is published in; the values are for people."""

    QFORMER = "a BLIP-2 Q-Former with its image encoder and projection"
    ORIGINAL_QFORMER = "the Q-Former of an original BLIP-Diffusion folder"
    PROJECTION = "the projection of an original BLIP-Diffusion folder"
    FINETUNED = "a fine-tuned BLIP-Diffusion checkpoint"
    UNET = "a diffusers U-Net"
    CONTROLNET = "a diffusers ControlNet"
    VAE = "a diffusers VAE"
    TEXT_ENCODER = "a CLIP text encoder"
    SUBJECT = "a tuned subject"


#: The keys that tell each kind, in the order in which they are tried.
_SIGNATURES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.QFORMER, ("query_tokens", "visual_encoder.embeddings.class_embedding")),
    (Kind.ORIGINAL_QFORMER, ("query_tokens", "Qformer.bert.embeddings.word_embeddings.weight")),
    (Kind.PROJECTION, ("dense1.weight", "dense2.weight", "LayerNorm.weight")),
    (Kind.FINETUNED, ("blip.query_tokens", "proj_layer.dense1.weight")),
    (Kind.CONTROLNET, ("controlnet_cond_embedding.conv_in.weight",)),
    (Kind.UNET, ("conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight")),
    (Kind.VAE, ("encoder.conv_in.weight", "decoder.conv_in.weight")),
    (Kind.TEXT_ENCODER, ("text_model.embeddings.token_embedding.weight",)),
    (Kind.TEXT_ENCODER, ("embeddings.token_embedding.weight", "final_layer_norm.weight")),  # without `text_model.`
    (Kind.SUBJECT, ("ctx_embeddings_cache",)),
)

#: Models of other kinds that people have in the same folders, for the error message.
_OTHER_MODELS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("a LoRA", lambda key: any(name in key for name in ("lora_up", "lora_down", "lora_A", "lora_B"))),
    ("an SDXL checkpoint", lambda key: key.startswith("conditioner.embedders.")),
    ("a Stable Diffusion checkpoint", lambda key: key.startswith("model.diffusion_model.")),
    ("a Flux or similar transformer", lambda key: key.startswith(("double_blocks.", "transformer_blocks."))),
    ("a BLIP-2 captioning model", lambda key: key.startswith("language_model.")),
    ("a CLIP vision model", lambda key: key.startswith("vision_model.")),
    ("a textual-inversion embedding", lambda key: key in ("emb_params", "clip_l", "string_to_param")),
)


def detect_kind(keys: Collection[str]) -> Kind | None:
    """Return the kind of file that holds tensors of these keys, or None if it is not BLIP-Diffusion's."""
    return next((kind for kind, signature in _SIGNATURES if all(key in keys for key in signature)), None)


def describe(keys: Iterable[str]) -> str:
    """Describe in words what a file with tensors of these keys is."""
    keys = list(keys)
    if kind := detect_kind(keys):
        return kind.value
    for description, belongs in _OTHER_MODELS:
        if any(belongs(key) for key in keys):
            return description
    return f'an unknown model ({len(keys)} tensors, the first is "{min(keys)}")'
