"""Training examples on disk, and the endless stream that training reads them from.

A *pair* is one example: a thing on another background, the photograph it was cut from, the word for the thing, and a
caption of the photograph. Its files are ``{key}.subject.webp``, ``{key}.target.webp`` and ``{key}.json``; they lie in a
folder, or one after the other in *shards*, tar archives as webdataset has them, which stream from a bucket as well.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..encoder.tokenizer import tokenize_subjects

PICTURE_ENDINGS = ("webp", "png", "jpg", "jpeg")


WEBP = {"quality": 95, "method": 2}  # lossy; a higher method takes twice as long for files of the same size


@dataclass(frozen=True, eq=False)
class Pair:
    """One training example.

    Args:
        key: its name, without a dot.
        subject: RGB, the thing on another background: what the subject encoder sees.
        target: RGB, the photograph: what the U-Net learns to draw.
        word: what the thing is.
        caption: of the photograph.
        extra: anything else that JSON can hold, kept as it is.
    """

    key: str
    subject: Image.Image
    target: Image.Image
    word: str
    caption: str
    extra: Mapping[str, object] = field(default_factory=dict)


#: The files of one pair by their ending, such as ``subject.webp``: what is in them, or where they are.
Files = Mapping[str, "bytes | Path"]


@dataclass(frozen=True)
class Sample:
    """A pair that is not decoded yet; ``place`` names it in the log."""

    key: str
    files: Files
    place: str


def encode_pair(pair: Pair) -> dict[str, bytes]:
    """The files of a pair by their ending.

    Raises:
        ValueError: its key has a dot, where webdataset would cut it.
    """
    if "." in pair.key or not pair.key:
        raise ValueError(f'The key "{pair.key}" of a pair is empty or has a dot in it: choose another.')
    details = {"word": pair.word, "caption": pair.caption, **pair.extra}
    return {
        "subject.webp": _encode_picture(pair.subject),
        "target.webp": _encode_picture(pair.target),
        "json": json.dumps(details, ensure_ascii=False).encode(),
    }


def decode_pair(sample: Sample) -> Pair:
    """The pair in its files; anything may be raised by a file that is damaged."""
    details = json.loads(_content(sample.files["json"]))
    word, caption = details.pop("word"), details.pop("caption")
    tokenize_subjects([word])  # raises for what cannot be read
    if not caption.strip():
        raise ValueError("its caption is empty")
    pictures = [_decode_picture(sample.files, role) for role in ("subject", "target")]
    return Pair(sample.key, *pictures, word, caption, details)


def _content(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _encode_picture(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "WEBP", **WEBP)
    return content.getvalue()


def _decode_picture(files: Files, role: str) -> Image.Image:
    for ending in PICTURE_ENDINGS:
        if (name := f"{role}.{ending}") in files:
            with Image.open(io.BytesIO(_content(files[name]))) as picture:
                return picture.convert("RGB")
    raise ValueError(f"it has no {role} picture")
