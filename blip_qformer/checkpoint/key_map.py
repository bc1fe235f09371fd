"""Translate the tensor keys of a published layout into the subject encoder's, and back, by a table of module names.

The tables themselves are in ``layouts/hub.py`` (Salesforce/blipdiffusion) and ``layouts/lavis.py`` (the authors' own
files); what both have in common is here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .read_tensors import CheckpointError

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
ADVICE = "choose the published BLIP-Diffusion files, or download this one again."


@dataclass(frozen=True)
class KeyMap:
    """A table of keys: a file's on the left, the encoder's on the right.

    Args:
        entries: File key -> encoder key. An entry names a module, whose weight and bias follow it, or a single tensor;
            ``{}`` stands for the number of a layer.
        ignored: Beginnings of file keys that the encoder has no use for.
    """

    entries: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    _inverse: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_inverse", {encoder: file for file, encoder in self.entries.items()})

    def encoder_key(self, key: str) -> str | None:
        """Return the encoder's key for a file's key, or None if the table has none."""
        return _translate(key, self.entries)

    def file_key(self, key: str) -> str:
        """Return the file's key for an encoder's key."""
        return _translate(key, self._inverse) or key

    def to_encoder(self, state_dict: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        """Translate a file's state dict into the encoder's keys.

        Args:
            state_dict: Tensors in the file's keys.
            path: The file, for the error message.

        Returns:
            Tensors in the encoder's keys.

        Raises:
            CheckpointError: A key is neither in the table nor ignored.
        """
        translated, unexpected = {}, []
        for key, tensor in state_dict.items():
            if key.endswith("position_ids") or key.startswith(self.ignored):
                continue
            encoder_key = self.encoder_key(key)
            if encoder_key is None:
                unexpected.append(key)
            else:
                translated[encoder_key] = tensor
        if unexpected:
            raise CheckpointError(
                f"{path} holds {format_keys(unexpected)}, which a BLIP-2 Q-Former does not have: {ADVICE}"
            )
        return translated

    def to_file(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate an encoder's state dict into the file's keys, the inverse of :meth:`to_encoder`."""
        return {self.file_key(key): tensor for key, tensor in state_dict.items()}


def format_keys(keys: Collection[str], limit: int = 5) -> str:
    """Format keys as a phrase: the first few, and how many more there are."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(f'"{key}"' for key in sorted(keys)[:limit]) + more


def qformer_keys(prefix: str, attention: str) -> dict[str, str]:
    """Return the entries of the Q-Former, which differ between layouts in two names only.

    Args:
        prefix: The beginning of every file key.
        attention: The name of the module that holds query, key and value.

    Returns:
        File key -> encoder key, as the entries of a :class:`KeyMap`.
    """
    table = {
        f"{prefix}embeddings.word_embeddings": "qformer.word_embedding",
        f"{prefix}embeddings.position_embeddings": "qformer.position_embedding",
        f"{prefix}embeddings.LayerNorm": "qformer.embedding_norm",
    }
    file_layer, layer = f"{prefix}encoder.layer.{{}}", "qformer.layers.{}"
    for file_block, block in (("attention", "self_attention"), ("crossattention", "cross_attention")):
        for name in ("query", "key", "value"):
            table[f"{file_layer}.{file_block}.{attention}.{name}"] = f"{layer}.{block}.{name}"
        table[f"{file_layer}.{file_block}.output.dense"] = f"{layer}.{block}.output"
        table[f"{file_layer}.{file_block}.output.LayerNorm"] = f"{layer}.{block}.norm"
    for suffix, block in (("", "text_feed_forward"), ("_query", "query_feed_forward")):
        table[f"{file_layer}.intermediate{suffix}.dense"] = f"{layer}.{block}.expand"
        table[f"{file_layer}.output{suffix}.dense"] = f"{layer}.{block}.contract"
        table[f"{file_layer}.output{suffix}.LayerNorm"] = f"{layer}.{block}.norm"
    return table


def projection_keys(prefix: str) -> dict[str, str]:
    """Return the entries of the projection, which are the same in every layout after a prefix."""
    return {
        f"{prefix}LayerNorm": "projection.norm",
        f"{prefix}dense1": "projection.expand",
        f"{prefix}dense2": "projection.contract",
    }


def _translate(key: str, table: Mapping[str, str]) -> str | None:
    """Look a key up as a tensor and then as a parameter of a module, its layer number replaced by ``{}``."""
    number = LAYER_NUMBER.search(key)
    pattern = LAYER_NUMBER.sub("{}", key, count=1)
    module, _, parameter = pattern.rpartition(".")
    if pattern in table:
        translated = table[pattern]
    elif module in table:
        translated = f"{table[module]}.{parameter}"
    else:
        return None
    return translated.replace("{}", number[0]) if number else translated
