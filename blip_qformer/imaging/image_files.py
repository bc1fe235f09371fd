"""Image files that people bring: photographs, masks, backgrounds."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..limits import MAX_JPEG_SCANS
from ..stand_in import stand_in

# What may stand behind FF in a JPEG and is no stuffed FF (00) and no restart inside a scan (D0 to D7).
JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
JPEG_START, SCAN, END = b"\xff\xd8", b"\xda", b"\xd9"


class UnreadableImageError(ValueError):
    """A file cannot be read as an image; the message names the file, the reason, and what to do."""


def open_upright(path: Path, mode: str = "RGB") -> Image.Image:
    """Read an image file whole and turn it upright, as its EXIF orientation says.

    Args:
        path: The file.
        mode: Pillow's mode of the result, such as ``RGB`` or ``L``.

    Returns:
        The image.

    Raises:
        UnreadableImageError: The file is missing, locked, truncated, no image, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow can read in spite of a fault is read; it names no file
            with path.open("rb") as file:
                check_jpeg_scans(file)
                return ImageOps.exif_transpose(Image.open(file)).convert(mode)
    except Exception as error:  # there is no list of what a damaged image can raise
        raise UnreadableImageError(_sentence(path, error)) from error


def check_jpeg_scans(file: BinaryIO) -> None:
    """Refuse a JPEG that makes its decoder pass over the image more often than any camera or program does.

    Args:
        file: A file at its start, where it is left. Of one that is no JPEG no more is read than shows that.

    Raises:
        ValueError: It has more than :data:`~blip_qformer.limits.MAX_JPEG_SCANS` scans.
    """
    content = file.read() if file.read(len(JPEG_START)) == JPEG_START else b""
    file.seek(0)
    scans = position = 0
    while (found := JPEG_MARKER.search(content, position)) and found[1] != END:
        scans += found[1] == SCAN
        if scans > MAX_JPEG_SCANS:
            raise ValueError(f"it has more than {MAX_JPEG_SCANS} scans")
        length = int.from_bytes(content[found.end() : found.end() + 2], "big")
        position = found.end() + (0 if found[1] in (b"\x01", b"\xd8") else max(length, 2))


def load_image(path: str | Path) -> Tensor:
    """Read an image file as pixels, upright.

    Args:
        path: The file.

    Returns:
        The image, of shape [1, H, W, 3] in 0..1.

    Raises:
        UnreadableImageError: See :func:`open_upright`.
    """
    return torch.from_numpy(np.array(open_upright(Path(path))))[None] / 255


def _sentence(path: Path, error: Exception) -> str:
    """Say why an image cannot be read, and what to do."""
    if isinstance(error, FileNotFoundError):
        return f"There is no picture {path}: check its name, or leave it out."
    if isinstance(error, PermissionError):
        return f"{path} may not be read by you: change its permissions, or leave it out."
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"{path} has more than {limit / 1e6:.0f} million pixels: scale it down, or leave it out."
    if isinstance(error, MemoryError):
        return f"{path} is too large for the memory: scale it down, or leave it out."
    if found := stand_in(path):
        return found.sentence([path])
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{path} is no picture that can be read ({reason}): save it anew from its original, or leave it out."
