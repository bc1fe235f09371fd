"""A subject's own checkpoint as the authors' fine-tuning writes it (``checkpoint_40.pth``): all parts in one file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: The parts and the beginnings of their names; behind those the names are those of an original folder's files.
PREFIXES = {
    "qformer": "blip.",
    "projection": "proj_layer.",
    "unet": "unet.",
    "vae": "vae.",
    "text_encoder": "text_encoder.",
}


SUBJECT = "ctx_embeddings_cache"


def split_finetuned(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of a fine-tuned checkpoint, each in the names of its own file."""
    return {
        part: {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        for part, prefix in PREFIXES.items()
    }
