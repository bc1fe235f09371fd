"""Open one file of tensors: memory-mapped, without running code, with one sentence for whatever is wrong with it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..stand_in import stand_in

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TENSOR_FILES = SAFETENSORS + PICKLES
PICKLE_MAGIC = (b"PK", b"\x80")  # torch.save writes a zip archive, and wrote a bare pickle before torch 1.6


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file, why, and what to do."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a ``.safetensors`` file or a torch pickle; their data is read when it is used.

    Args:
        path: The file.

    Returns:
        The state dict. A training checkpoint's ``model`` or ``state_dict`` is unwrapped; the key of a bare tensor is
        the file's name without ending.

    Raises:
        CheckpointError: The file is missing, empty, truncated, a git-lfs pointer, no file of tensors, or would run
            code.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to nothing: download what it pointed to again.")
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}: check the name, or download it again.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty, so its download did not finish: get it again.")
    check_content(path)
    tensors = _read_safetensors(path) if path.suffix.lower() in SAFETENSORS else _read_pickle(path)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: choose a file of model weights.")
    return tensors


def check_content(path: Path) -> None:
    """Refuse a git-lfs pointer or a web page in the place of a file.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is one.
    """
    if found := stand_in(path):
        raise CheckpointError(found.sentence([path]))


def is_pickle(path: Path) -> bool:
    """Return whether a file begins as torch's pickles do. A safetensors file can have the same first bytes."""
    with path.open("rb") as file:
        return file.read(4).startswith(PICKLE_MAGIC)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a ``.safetensors`` file; an empty dict for a pickle."""
    if path.suffix.lower() not in SAFETENSORS:
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file that lies beside weights.

    Args:
        folder: The folder of the weights.
        name: The name of the JSON file.

    Returns:
        Content of the JSON file; an empty dict if there is no such file.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    check_content(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object: download it again.")
    return config


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file ({error}): it is truncated or something else; download it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    if not is_pickle(path):
        raise CheckpointError(f"{path} is not a file of tensors: choose a .safetensors, .bin, .pt or .pth file.")
    try:
        content = _unpickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that would run code when opened, so it was left closed: get the weights as "
            ".safetensors, or from a source you trust."
        ) from error
    except Exception as error:  # a broken pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is no whole file of tensors ({reason}): it is truncated or something else; download it again."
        ) from error
    return _named_tensors(content, path)


def _unpickle(path: Path) -> object:
    """Load a pickle with the restricted unpickler, mapped into memory if its format allows."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6: cannot be mapped


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors of whatever was pickled; empty if it holds none."""
    if isinstance(content, Tensor):
        return {path.stem: content}
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
