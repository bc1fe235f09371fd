"""A subject as a file: one ``.safetensors`` that is also a textual-inversion embedding.

It holds the tensor ``emb_params`` [16, 768] and nothing else, so that ComfyUI's ``embedding:name`` and other programs
read it as sixteen words. What only this library needs is text in its header, and so is a small picture, under the name
where ComfyUI's model library looks for one. No file is written beside it: a picture there is the user's own.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..atomic import atomic_file
from ..checkpoint.read_tensors import CheckpointError, check_header_size, is_pickle
from ..checkpoint.weights import DTYPES, is_finite
from ..limits import MAX_POSITIONS, MAX_PREVIEW_BYTES, MAX_WIDTH
from ..plain_data import parse_json, validate
from ..stand_in import stand_in
from .preview import checked_preview
from .subject import Subject

SUFFIX = ".safetensors"
TENSOR = "emb_params"
FORMAT, VERSION = "blip-subject", 1
COVERS = "ssmd_cover_images"  # where ComfyUI's app/model_manager.py reads previews: a JSON list of base64
PLAIN_VECTORS = 16  # as many as every published encoder gives
LORA_KEYS = ("lora_up", "lora_down", "lora_A", "lora_B", "lora_te", "lora_unet")


class SubjectFileError(ValueError):
    """A file that is no subject. The message says which file, what it is instead, and what to do."""


def save_subject(path: str | Path, subject: Subject, overwrite: bool = False, with_preview: bool = True) -> None:
    """Write a subject of one row, whole or not at all.

    Args:
        path: The file to write.
        subject: The subject. A file that already holds the same subject is left as it is, except that it gets the
            preview that it lacks, or loses the one that is not wanted.
        overwrite: Whether another subject that lies there may be replaced; other files never are.
        with_preview: Whether the file holds the small picture of the subject.

    Raises:
        FileExistsError: The file exists, and ``overwrite`` is False or it is no subject of ours.
        OSError: The folder cannot be written to.
        ValueError: The subject has several rows.
    """
    path = Path(path)
    if len(subject) != 1:
        raise ValueError(
            f'The subject "{subject.word}" has {len(subject)} rows and a file holds one: encode it as "one subject", '
            "or take one step of a trajectory with Subject Interpolate."
        )
    subject = subject if with_preview else replace(subject, preview=b"")
    saved = _same_subject(path, subject)
    if saved and (saved.preview == subject.preview or (saved.preview and with_preview)):
        return  # such as a graph that is queued again
    if not saved and (path.is_dir() or (path.exists() and not overwrite)):
        raise FileExistsError(f"{path} exists already: choose another name, or switch overwrite on.")
    if path.exists() and not _is_ours(path):
        raise FileExistsError(
            f"{path} exists already and is no subject that was saved here, so that it is not replaced: choose another "
            "name, or delete it yourself."
        )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "word": subject.word,
        "encoder": subject.encoder,
        "source": subject.source,
    }
    if subject.preview:
        metadata[COVERS] = json.dumps([base64.b64encode(subject.preview).decode("ascii")])
    with atomic_file(path) as temporary:
        temporary.write_bytes(save({TENSOR: subject.vectors[0].contiguous()}, metadata=metadata))


def load_subject(path: str | Path, word: str = "") -> Subject:
    """Read a subject, or a plain textual inversion that can be one.

    A textual inversion without our header is accepted if it is one tensor of sixteen vectors, which is what other
    programs make of a subject when they save it again. Fewer or more vectors are ordinary words of a prompt.

    Args:
        path: The file.
        word: The word for the subject; that of the file if empty.

    Returns:
        The subject, of one row.

    Raises:
        SubjectFileError: The file is missing, incomplete or something else, or no word is known.
    """
    path = Path(path)
    vectors, header = _read(path)
    is_ours = header.get("format") == FORMAT
    if is_ours and _version(header) > VERSION:
        raise SubjectFileError(
            f"{path} is a subject of version {header.get('version')}, and this pack reads up to {VERSION}: update the "
            "pack."
        )
    if not is_ours and len(vectors) != PLAIN_VECTORS:
        raise SubjectFileError(
            f"{path} is a textual inversion of {len(vectors)} vectors, and a subject has {PLAIN_VECTORS}: write "
            f"embedding:{path.stem} into a prompt instead."
        )
    known = header if is_ours else {}
    word = word.strip() or known.get("word", "")
    if not word:
        raise SubjectFileError(f"{path} does not say which word its subject is: write it, such as dog.")
    preview = _read_preview(known.get(COVERS, ""))
    return Subject(vectors[None], word, known.get("encoder", ""), known.get("source", ""), preview)


def _read(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    """Return the one tensor [n, width] of a file, and the metadata in its header."""
    if not path.is_file():
        raise SubjectFileError(f"There is no file {path}: check the name.")
    if found := stand_in(path):
        raise SubjectFileError(found.sentence([path]))
    try:
        check_header_size(path)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
            _check_is_embedding(path, shapes)
            vectors = file.get_tensor(names[0]).clone()  # a copy, so that the file is not kept open
            header = file.metadata() or {}
    except PermissionError as error:
        raise SubjectFileError(f"{path} may not be read by you: change its permissions.") from error
    except CheckpointError as error:
        raise SubjectFileError(str(error)) from error
    except (SafetensorError, OSError) as error:
        if is_pickle(path):
            raise SubjectFileError(
                f"{path} is a pickle ({path.suffix or 'no ending'}), which can run code and holds no word: choose a "
                f".safetensors, or write embedding:{path.stem} into a prompt."
            ) from error
        raise SubjectFileError(
            f"{path} is no whole safetensors file ({error}): it is truncated or something else; copy it again."
        ) from error
    if vectors.dtype not in DTYPES:
        raise SubjectFileError(f"{path} holds {vectors.dtype} and not vectors: choose a saved subject.")
    if not is_finite(vectors):
        raise SubjectFileError(f"{path} holds NaN or infinite values: it is damaged; save the subject again.")
    return vectors, header


def _is_ours(path: Path) -> bool:
    """Return whether a file has the header of a subject, whatever else is in it."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _same_subject(path: Path, subject: Subject) -> Subject | None:
    """Return the subject in a file if it is the same, whatever its preview; else None."""
    try:
        saved = load_subject(path)
    except ValueError:
        return None
    same_text = (saved.word, saved.encoder, saved.source) == (subject.word, subject.encoder, subject.source)
    return saved if same_text and torch.equal(saved.vectors, subject.vectors) else None


def _read_preview(text: str) -> bytes:
    """Return the preview in a header, or nothing: a subject is worth loading without its picture."""
    if len(text) > 2 * MAX_PREVIEW_BYTES:  # base64 is a third longer than what it holds
        return b""
    try:
        covers = validate(list[str], parse_json(text or "[]", "The preview"), "The preview")
        return checked_preview(base64.b64decode(covers[0], validate=True)) if covers else b""
    except ValueError:  # of JSON, base64 or types
        return b""


def _check_is_embedding(path: Path, shapes: dict[str, list[int]]) -> None:
    """Refuse, by names and shapes alone, other files that people keep in a folder of embeddings."""
    if any(key in name for name in shapes for key in LORA_KEYS):
        raise SubjectFileError(f"{path} is a LoRA and no subject: load it with Load LoRA.")
    if len(shapes) != 1:
        listed = ", ".join(sorted(shapes)[:3]) + (", ..." if len(shapes) > 3 else "")
        raise SubjectFileError(
            f"{path} holds {len(shapes)} tensors ({listed}), and a subject is one: it is an embedding for another "
            "model or a whole checkpoint; choose a saved subject."
        )
    ((name, shape),) = shapes.items()
    if len(shape) != 2 or not (0 < shape[0] <= MAX_POSITIONS and 0 < shape[1] <= MAX_WIDTH):
        raise SubjectFileError(
            f"{path} holds {name} of shape {shape}, and a subject has the shape [16, 768]: choose a saved subject."
        )


def _version(header: dict[str, str]) -> int:
    """Return the version in a header; one that is no number was not written by this library and counts as too new."""
    text = header.get("version", "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else VERSION + 1
