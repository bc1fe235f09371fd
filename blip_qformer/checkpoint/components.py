"""Find the components of a checkpoint in a folder by what their files hold."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..stand_in import stand_in, stand_in_sentences
from .detect import Kind, detect_kind
from .hub_cache import snapshot_folder
from .key_map import format_keys
from .network_config import check_network_config
from .read_tensors import SAFETENSORS, TENSOR_FILES, CheckpointError, read_config, read_tensors
from .weights import check_dtypes, check_finite

ENCODER_FOLDERS = ("qformer", "blip_model")  # in a Hub folder, in an original folder

#: The names that published folders have for their parts, so that a part is not taken for a model of its own.
COMPONENT_FOLDERS = (
    *ENCODER_FOLDERS,
    "proj_layer",
    "ctx_embeddings_cache",
    "unet",
    "vae",
    "text_encoder",
    "controlnet",
    "image_processor",
    "tokenizer",
    "scheduler",
    "feature_extractor",
    "safety_checker",
)

WITH_CONFIG = (Kind.UNET, Kind.CONTROLNET, Kind.VAE, Kind.TEXT_ENCODER)  # kinds with a config.json of their own

SHARD = re.compile(r"-\d{5}-of-(?P<count>\d{5})(?=\.)")  # before or behind a variant such as .fp16
NON_EMA = re.compile(r"non[-_.]?ema", re.IGNORECASE)

logger = logging.getLogger("blip_diffusion")


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

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights, still mapped, for a network; all of the file is read.

        Raises:
            CheckpointError: The file cannot be read any more, or holds NaN or infinity.
        """
        state_dict = self.state_dict()
        check_dtypes(state_dict, self.path)
        check_finite(state_dict, self.path)
        return state_dict


def find_components(folder: Path) -> tuple[dict[Kind, Component], list[str]]:
    """Find the components in a folder and its subfolders.

    Where several files fit one component, the first in this order is taken, and a line in the log says so:

    1. a file in a subfolder with a published name (``unet``, ``qformer``, ...), before one elsewhere;
    2. a file whose name does not say ``non_ema``, before one that does: published pictures are drawn with EMA weights;
    3. ``.safetensors``, before pickles;
    4. the larger, that is the more precise;
    5. the shorter name, that is the one without a variant; then the first in the alphabet.

    Args:
        folder: The folder of a checkpoint.

    Returns:
        The components, and a sentence for each file that could not be read, with one for all git-lfs pointers.
    """
    folder = snapshot_folder(folder)
    fitting: dict[Kind, list[Component]] = {}
    models = sorted(_models(folder), key=partial(_preference, folder))
    problems = stand_in_sentences(file for files in models for file in files)
    for files in models:
        if any(stand_in(file) for file in files):
            continue  # named above, all in one sentence
        try:
            _check_shards(files)
            if kind := detect_kind(_read(files)):
                config = read_config(files[0].parent)
                if kind in WITH_CONFIG:
                    check_network_config(config, files[0].parent / "config.json")
                component = Component(files[0], config, partial(_read, files))
                fitting.setdefault(kind, []).append(component)
        except CheckpointError as error:
            problems.append(str(error))
    _log_choices(folder, [components for components in fitting.values() if len(components) > 1])
    # Two files with one broken config between them are one problem.
    return {kind: components[0] for kind, components in fitting.items()}, [*dict.fromkeys(problems)]


def has_encoder_folder(folder: Path) -> bool:
    """Return whether a folder is laid out as a published checkpoint, by the names of its subfolders alone."""
    return any((folder / name).is_dir() for name in ENCODER_FOLDERS)


def is_component_folder(folder: Path) -> bool:
    """Return whether a folder is a part of the checkpoint around it, by its name, and no checkpoint itself."""
    return folder.name in COMPONENT_FOLDERS and not has_encoder_folder(folder)


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of all files of one model."""
    return {key: tensor for file in files for key, tensor in read_tensors(file).items()}


def find_weights(folder: Path) -> dict[str, Tensor]:
    """Map the weights of the one model in a folder, shards put together, ``.safetensors`` before pickles.

    Args:
        folder: A folder as transformers saves a model.

    Raises:
        CheckpointError: There are no weights, or they cannot be read.
    """
    models = [files for files in _models(folder) if files[0].parent == folder]
    if not models:
        raise CheckpointError(f"{folder} holds no weights: download the whole folder.")
    files = min(models, key=partial(_preference, folder))
    _check_shards(files)
    return _read(files)


def _models(folder: Path) -> list[list[Path]]:
    """Return the files of tensors in a folder and its subfolders, the shards of one model together, in their order."""
    models: dict[tuple[Path, str], list[Path]] = {}
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if file.suffix.lower() in TENSOR_FILES:
            shard = SHARD.search(file.name)
            whole = file.with_name(SHARD.sub("", file.name))
            models.setdefault((whole, shard["count"] if shard else ""), []).append(file)
    return [*models.values()]


def _check_shards(files: Sequence[Path]) -> None:
    """Raise CheckpointError if some shards of a model are missing."""
    if not (shard := SHARD.search(files[0].name)):
        return
    count = int(shard["count"])
    names = [SHARD.sub(f"-{number:05}-of-{count:05}", files[0].name) for number in range(1, count + 1)]
    if missing := [name for name in names if name not in {file.name for file in files}]:
        raise CheckpointError(
            f"{files[0].parent} lacks {format_keys(missing)}, of a model in {count} shards: download what is missing "
            "into this folder."
        )


def _preference(folder: Path, files: Sequence[Path]) -> tuple[bool, bool, bool, int, int, Path]:
    """Return a sort key that puts the preferred files first; the order is that of :func:`find_components`."""
    first = files[0]
    return (
        first.parent == folder or not is_component_folder(first.parent),
        NON_EMA.search(first.name) is not None,
        first.suffix.lower() not in SAFETENSORS,
        -sum(file.stat().st_size for file in files if file.is_file()),
        len(first.name),
        first,
    )


def _log_choices(folder: Path, choices: Sequence[Sequence[Component]]) -> None:
    """Log in one line which files were taken where several fit."""
    names = [[component.path.relative_to(folder).as_posix() for component in components] for components in choices]
    if names:
        taken = "; ".join(f"{first} and not {', '.join(others)}" for first, *others in names)
        logger.info("%s holds several files for one part: %s is read.", folder, taken)
