"""The parts of a checkpoint that lie in a folder, found by what their files hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from .detect import Kind, detect_kind
from .read_tensors import SAFETENSORS, TENSOR_FILES, CheckpointError, read_config, read_tensors

PIECE = re.compile(r"-\d{5}-of-\d{5}$")  # how one model's file is named that was saved in several


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: where it lies, its config file's content, and a way to its weights."""

    path: Path
    config: dict
    read: Callable[[], Mapping[str, Tensor]] = field(repr=False)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights in their published names, mapped anew at each call: who is done with them frees the memory."""
        return self.read()


def find_components(folder: Path) -> tuple[dict[Kind, Component], list[str]]:
    """The parts in a folder and its subfolders, and a sentence for each file that could not be read.

    Where a part is there twice, ``.safetensors`` goes before pickles and the larger (more precise) before the smaller.
    """
    parts: dict[Kind, Component] = {}
    problems = []
    for pieces in sorted(_models(folder), key=_preference):
        try:
            kind = detect_kind(_read(pieces))
            if kind and kind not in parts:
                parts[kind] = Component(pieces[0], read_config(pieces[0].parent), partial(_read, pieces))
        except CheckpointError as error:
            problems.append(str(error))
    return parts, problems


def _read(pieces: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for piece in pieces for name, tensor in read_tensors(piece).items()}


def _models(folder: Path) -> list[list[Path]]:
    """The files of tensors, those that are pieces of one model together."""
    models: dict[Path, list[Path]] = {}
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if file.suffix.lower() in TENSOR_FILES:
            models.setdefault(file.with_stem(PIECE.sub("", file.stem)), []).append(file)
    return [*models.values()]


def _preference(pieces: list[Path]) -> tuple[bool, int, Path]:
    """A sort key that puts what is to be taken first."""
    size = sum(piece.stat().st_size for piece in pieces if piece.is_file())
    return pieces[0].suffix.lower() not in SAFETENSORS, -size, pieces[0]
