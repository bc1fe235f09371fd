"""Image files that people bring: photographs, masks, backgrounds."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps


class UnreadableImageError(ValueError):
    """A file cannot be read as an image; the message is the reason, without the file's name."""


def open_upright(path: Path, mode: str = "RGB") -> Image.Image:
    """Read an image file whole and turn it upright, as its EXIF orientation says.

    Args:
        path: The file.
        mode: Pillow's mode of the result, such as ``RGB`` or ``L``.

    Returns:
        The image.

    Raises:
        UnreadableImageError: The file is missing, truncated, or no image.
    """
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert(mode)
    except Exception as error:  # there is no list of what a damaged image can raise
        raise UnreadableImageError(str(error)) from error
