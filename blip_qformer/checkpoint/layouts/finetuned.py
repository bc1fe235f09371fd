"""The layout of a fine-tuned checkpoint as the authors' code writes it (``checkpoint_40.pth``): all in one file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: The components and the prefixes of their keys; behind the prefix, keys are those of an original folder's files.
PREFIXES = {
    "qformer": "blip.",
    "projection": "proj_layer.",
    "unet": "unet.",
    "vae": "vae.",
    "text_encoder": "text_encoder.",
}
SUBJECT_KEY = "ctx_embeddings_cache"  # the subject's vectors [1, 16, 768]


def split_finetuned(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a fine-tuned checkpoint into its components, each in the keys of its own file."""
    return {
        name: {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        for name, prefix in PREFIXES.items()
    }
