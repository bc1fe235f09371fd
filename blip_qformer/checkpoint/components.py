"""Find the components of a checkpoint in a folder by what their files hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..stand_in import stand_in, stand_in_sentences
from .detect import Kind, detect_kind
from .read_tensors import SAFETENSORS, TENSOR_FILES, CheckpointError, read_config, read_tensors

SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # the end of the name of a file that holds a share of one model


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint.

    Args:
        path: The network's file, or the first of several.
        config: The content of its ``config.json``; empty if there is none.
        state_dict: A function that returns its weights in their published keys. Each call maps the files anew, so that
            the memory is free once the caller drops the result.
    """

    path: Path
    config: dict[str, Any]
    state_dict: Callable[[], Mapping[str, Tensor]] = field(repr=False)


def find_components(folder: Path) -> tuple[dict[Kind, Component], list[str]]:
    """Find the components in a folder and its subfolders.

    If a component is there twice, ``.safetensors`` is preferred to pickles, and the larger (more precise) file to the
    smaller one.

    Args:
        folder: The folder of a checkpoint.

    Returns:
        The components, and a sentence for each file that could not be read, with one for all git-lfs pointers.
    """
    components: dict[Kind, Component] = {}
    models = sorted(_models(folder), key=_preference)
    problems = stand_in_sentences(file for files in models for file in files)
    for files in models:
        if any(stand_in(file) for file in files):
            continue  # named above, all in one sentence
        try:
            kind = detect_kind(_read(files))
            if kind and kind not in components:
                components[kind] = Component(files[0], read_config(files[0].parent), partial(_read, files))
        except CheckpointError as error:
            problems.append(str(error))
    return components, problems


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of all files of one model."""
    return {key: tensor for file in files for key, tensor in read_tensors(file).items()}


def _models(folder: Path) -> list[list[Path]]:
    """Return the files of tensors in a folder and its subfolders, the shards of one model together."""
    models: dict[Path, list[Path]] = {}
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if file.suffix.lower() in TENSOR_FILES:
            models.setdefault(file.with_stem(SHARD.sub("", file.stem)), []).append(file)
    return [*models.values()]


def _preference(files: Sequence[Path]) -> tuple[bool, int, Path]:
    """Return a sort key that puts the preferred files first."""
    size = sum(file.stat().st_size for file in files if file.is_file())
    return files[0].suffix.lower() not in SAFETENSORS, -size, files[0]
