"""Training pairs, and the files that hold one.

A *pair* is one training example: a subject on another background, the photograph it was cut out of, its word, and a
caption of the photograph. A pair's files are ``{key}.subject.webp``, ``{key}.target.webp`` and ``{key}.json``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict

from ..encoder.tokenizer import tokenize_subjects
from ..imaging.image_files import check_jpeg_scans
from ..limits import MAX_LINE_BYTES, MAX_PAIR_PIXELS
from ..plain_data import needs, parse_json, validate

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
WEBP_OPTIONS = {"quality": 95, "method": 2}  # lossy; a higher method takes twice as long for files of the same size


@dataclass(frozen=True, eq=False)
class Pair:
    """One training example.

    Args:
        key: Name of the pair, without a dot.
        subject: RGB image of the subject on another background, the subject encoder's input.
        target: RGB photograph, which the U-Net learns to generate.
        word: The subject's word.
        caption: The photograph's caption.
        extra: Anything else that JSON can hold; it is kept as it is.
    """

    key: str
    subject: Image.Image
    target: Image.Image
    word: str
    caption: str
    extra: Mapping[str, object] = field(default_factory=dict)


class PairDetails(BaseModel):
    """The content of a pair's ``json``; other names are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    word: Annotated[str, needs("text")]
    caption: Annotated[str, needs("text")]


@dataclass(frozen=True)
class EncodedPair:
    """A pair as its files, which are not decoded yet.

    Args:
        key: The pair's name.
        files: Content or path of each file by what follows the key in its name, such as ``subject.webp``.
        origin: Where the pair comes from, for the log.
    """

    key: str
    files: Mapping[str, bytes | Path]
    origin: str


def encode_pair(pair: Pair) -> dict[str, bytes]:
    """Encode a pair as its files.

    Args:
        pair: The pair.

    Returns:
        Content of each file by what follows the key in its name.

    Raises:
        ValueError: The key is empty or has a dot, at which webdataset would cut it.
    """
    if "." in pair.key or not pair.key:
        raise ValueError(f'The key "{pair.key}" of a pair is empty or has a dot in it: choose another.')
    details = {"word": pair.word, "caption": pair.caption, **pair.extra}
    return {
        "subject.webp": _encode_image(pair.subject),
        "target.webp": _encode_image(pair.target),
        "json": json.dumps(details, ensure_ascii=False).encode(),
    }


def decode_pair(encoded: EncodedPair) -> Pair:
    """Decode a pair from its files.

    Args:
        encoded: The files.

    Returns:
        The pair.

    Raises:
        Exception: A file is missing or damaged; which exception it is depends on the damage.
    """
    if len(content := _read(encoded.files["json"])) > MAX_LINE_BYTES:
        raise ValueError(f"its json has {len(content)} bytes")
    details = validate(PairDetails, parse_json(content, "its json"), "its json")
    tokenize_subjects([details.word])  # raises if the Q-Former cannot read it
    if not details.caption.strip():
        raise ValueError("its caption is empty")
    subject, target = (_decode_image(encoded.files, role) for role in ("subject", "target"))
    return Pair(encoded.key, subject, target, details.word, details.caption, details.model_extra or {})


def _read(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _encode_image(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP", **WEBP_OPTIONS)
    return content.getvalue()


def _decode_image(files: Mapping[str, bytes | Path], role: str) -> Image.Image:
    for suffix in IMAGE_SUFFIXES:
        if (name := f"{role}.{suffix}") in files:
            content = io.BytesIO(_read(files[name]))
            check_jpeg_scans(content)
            with Image.open(content) as image:  # reads the header, no pixels
                if (pixels := image.width * image.height) > MAX_PAIR_PIXELS:
                    raise ValueError(f"its {role} picture has {pixels / 1e6:.0f} million pixels: scale it down")
                return image.convert("RGB")
    raise ValueError(f"it has no {role} picture")
