"""Translating the tensor names of a published file into the encoder's own, by a table of module names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .read_tensors import CheckpointError

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class KeyMap:
    """A file's names on the left, the encoder's on the right; ``{}`` stands for the number of a layer.

    An entry names a module (its weight and bias follow it) or a single tensor.
    """

    entries: Mapping[str, str]
    ignored: tuple[str, ...] = ()  # beginnings of names that the encoder has no use for
    _inverse: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_inverse", {ours: theirs for theirs, ours in self.entries.items()})

    def encoder_name(self, name: str) -> str | None:
        """The encoder's name for a file's tensor, or None where the table has none."""
        return _look_up(name, self.entries)

    def file_name(self, name: str) -> str:
        """The file's name for an encoder's tensor."""
        return _look_up(name, self._inverse) or name

    def to_encoder(self, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        """Every tensor under the encoder's name for it.

        Raises:
            CheckpointError: a tensor is neither in the table nor among the ignored ones.
        """
        wanted = {name: tensor for name, tensor in weights.items() if not self._is_ignored(name)}
        names = {name: self.encoder_name(name) for name in wanted}
        if unexpected := [name for name, ours in names.items() if ours is None]:
            raise CheckpointError(f"{path} holds {listed(unexpected)}, which a BLIP-2 Q-Former does not have: {REMEDY}")
        return {names[name]: tensor for name, tensor in wanted.items()}

    def to_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`to_encoder`."""
        return {self.file_name(name): tensor for name, tensor in weights.items()}

    def _is_ignored(self, name: str) -> bool:
        return name.endswith("position_ids") or name.startswith(self.ignored)


REMEDY = "choose the published BLIP-Diffusion files, or download this one again."


def listed(names: list[str], most: int = 5) -> str:
    """Names as a phrase: the first few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f'"{name}"' for name in sorted(names)[:most]) + more


def _look_up(name: str, table: Mapping[str, str]) -> str | None:
    number = LAYER_NUMBER.search(name)
    pattern = LAYER_NUMBER.sub("{}", name, count=1)
    for module, suffix in ((pattern, ""), pattern.rsplit(".", 1) if "." in pattern else (pattern, "")):
        if module in table:
            translated = table[module] + ("." + suffix if suffix else "")
            return translated.replace("{}", number[0]) if number else translated
    return None


def qformer_names(prefix: str, attention: str) -> dict[str, str]:
    """The part of a table that both published layouts share, but for a prefix and the name of the inner attention."""
    table = {
        f"{prefix}embeddings.word_embeddings": "qformer.word_embedding",
        f"{prefix}embeddings.position_embeddings": "qformer.position_embedding",
        f"{prefix}embeddings.LayerNorm": "qformer.embedding_norm",
    }
    layer, ours = f"{prefix}encoder.layer.{{}}", "qformer.layers.{}"
    for theirs, block in (("attention", "self_attention"), ("crossattention", "cross_attention")):
        for name in ("query", "key", "value"):
            table[f"{layer}.{theirs}.{attention}.{name}"] = f"{ours}.{block}.{name}"
        table[f"{layer}.{theirs}.output.dense"] = f"{ours}.{block}.output"
        table[f"{layer}.{theirs}.output.LayerNorm"] = f"{ours}.{block}.norm"
    for theirs, block in (("", "text_feed_forward"), ("_query", "query_feed_forward")):
        table[f"{layer}.intermediate{theirs}.dense"] = f"{ours}.{block}.expand"
        table[f"{layer}.output{theirs}.dense"] = f"{ours}.{block}.contract"
        table[f"{layer}.output{theirs}.LayerNorm"] = f"{ours}.{block}.norm"
    return table


def projection_names(prefix: str) -> dict[str, str]:
    """The projection's three modules, named alike in both published layouts."""
    return {
        f"{prefix}LayerNorm": "projection.norm",
        f"{prefix}dense1": "projection.expand",
        f"{prefix}dense2": "projection.contract",
    }
