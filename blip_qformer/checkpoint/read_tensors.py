"""Open one file of tensors: mapped, within bounds, without running code, and with one sentence for what is wrong."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..limits import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_PICKLE_BYTES, MAX_TENSORS
from ..plain_data import PlainDataError, parse_json, read_bytes, shown
from ..stand_in import stand_in

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TENSOR_FILES = SAFETENSORS + PICKLES
PICKLE_MAGIC = (b"PK", b"\x80")  # torch.save writes a zip archive, and wrote a bare pickle before torch 1.6
#: What a pickle can hold beside plain arrays, for the error message.
_STRANGE: dict[str, Callable[[Tensor], bool]] = {
    "tensor without numbers (meta)": lambda tensor: tensor.is_meta,
    "quantized tensor": lambda tensor: tensor.is_quantized,
    "sparse or nested tensor": lambda tensor: tensor.layout != torch.strided or tensor.is_nested,
    "tensor of another device": lambda tensor: tensor.device.type != "cpu",
    "complex tensor": lambda tensor: tensor.is_complex(),
}


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
    with naming_file(path):
        tensors = _read_safetensors(path) if path.suffix.lower() in SAFETENSORS else _read_pickle(path)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors: choose a file of model weights.")
        check_tensors(tensors, path)
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
        CheckpointError: The file is no JSON object, or cannot be read.
    """
    path = folder / name
    if not path.is_file():
        return {}
    check_content(path)
    with naming_file(path):
        config = parse_json(read_bytes(path, MAX_CONFIG_BYTES), str(path))
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object: download it again.")
    return config


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn whatever is raised while a file is read into one sentence with its name.

    Libraries that parse damaged files raise what they like; there is no list. Only lack of memory stays what it is.

    Args:
        path: The file or folder that is read inside.

    Raises:
        CheckpointError: Something was raised.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except PlainDataError as error:
        raise CheckpointError(str(error)) from error
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read by you: change its permissions.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} is no whole file of tensors ({reason[:200]}): it is truncated or something else; download it "
            "again."
        ) from error


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are no plain arrays on the CPU, claim more numbers than their file holds, or have no name.

    Args:
        tensors: Tensors by name.
        path: The file.

    Raises:
        CheckpointError: There are too many tensors, or one is not plain; it is named. Or a name holds line breaks or
            half characters, which no error's sentence could.
    """
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors, more than any model of this kind: choose another file."
        )
    claimed, size = 0, path.stat().st_size
    for name, tensor in tensors.items():
        if not name.isprintable():
            raise CheckpointError(f"{path} holds a tensor of the damaged name {shown(name)}: download it again.")
        kind = next((kind for kind, applies in _STRANGE.items() if applies(tensor)), None)
        if kind is not None:
            raise CheckpointError(f'{path} holds "{name}" as a {kind}: get the weights in float16 or float32.')
        claimed += tensor.numel() * tensor.element_size()
        if claimed > 2 * size:  # twice, as two names may share one array
            raise CheckpointError(f'{path} claims more numbers in "{name}" than it holds: download it again.')


def check_header_size(path: Path) -> None:
    """Refuse a ``.safetensors`` whose header is larger than that of any model.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER_BYTES < length < path.stat().st_size:
        raise CheckpointError(
            f"{path} has a header of {length / 1e6:.0f} MB, so it is no model of this kind: choose another file."
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_header_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file ({error}): it is truncated or something else; download it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    if not is_pickle(path):
        raise CheckpointError(f"{path} is not a file of tensors: choose a .safetensors, .bin, .pt or .pth file.")
    _check_archive(path)
    try:
        content = _unpickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that would run code when opened, so it was left closed: get the weights as "
            ".safetensors, or from a source you trust."
        ) from error
    return _named_tensors(content, path)


def _check_archive(path: Path) -> None:
    """Refuse an archive of torch whose pickle would unpack to more than any model's."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        pickled = sum(entry.file_size for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED)
        pickled += sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith(".pkl"))
    if pickled > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path} would unpack to {pickled / 1e6:.0f} MB before any tensor is read: it is no model of this kind; "
            "choose another file."
        )


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
