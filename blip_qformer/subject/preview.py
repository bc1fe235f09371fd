"""The preview of a subject: a small JPEG of what its encoder was shown, by which a person recognises it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ..imaging.image_files import check_jpeg_scans
from ..limits import MAX_PREVIEW_BYTES, MAX_PREVIEW_EDGE

EDGE = 256  # pixels, of a preview; of each of several tiles it is half
MAX_TILES = 4
QUALITY = 85


def make_preview(squares: Tensor) -> bytes:
    """Make a preview of square images.

    Args:
        squares: Images of shape [N, 3, size, size] in 0..1; of more than four, the first four are shown.

    Returns:
        A JPEG of at most 256 x 256 pixels; nothing if there are no images.
    """
    pixels = rearrange((squares[:MAX_TILES].clamp(0, 1) * 255).round().to("cpu", torch.uint8), "n c h w -> n h w c")
    return _encode([Image.fromarray(image) for image in pixels.numpy()])


def join_previews(previews: Sequence[bytes]) -> bytes:
    """Make one preview of several, each seen whole in a tile of its own.

    Args:
        previews: Previews; empty ones are left out, and of more than four the first four are shown.

    Returns:
        The only preview as it is, or a JPEG with up to four tiles; nothing if there is none.
    """
    given = list(dict.fromkeys(preview for preview in previews if preview))
    if len(given) < 2:
        return given[0] if given else b""
    return _encode([image for image in map(_decode, given[:MAX_TILES]) if image])


def checked_preview(content: bytes) -> bytes:
    """Return a preview that came from a file, or nothing if it is no small JPEG that can be decoded.

    Args:
        content: What the file says is a preview.
    """
    return content if len(content) <= MAX_PREVIEW_BYTES and _decode(content) else b""


def preview_image(preview: bytes) -> Tensor | None:
    """Decode a preview.

    Args:
        preview: The preview.

    Returns:
        An image of shape [1, H, W, 3] in 0..1, or None if there is no preview.
    """
    image = _decode(preview)
    return None if image is None else torch.from_numpy(np.array(image))[None].float() / 255


def _encode(images: Sequence[Image.Image]) -> bytes:
    """Lay images out as tiles, one alone or in two columns, and encode them."""
    if not images:
        return b""
    columns = min(len(images), 2)
    edge = EDGE // columns
    sheet = Image.new("RGB", (EDGE, edge * -(-len(images) // columns)), "white")
    for index, image in enumerate(images):
        corner = (index % columns * edge, index // columns * edge)
        sheet.paste(ImageOps.pad(image, (edge, edge), Image.Resampling.BICUBIC, color="white"), corner)
    content = io.BytesIO()
    sheet.save(content, format="JPEG", quality=QUALITY)
    return content.getvalue()


def _decode(content: bytes) -> Image.Image | None:
    """Decode a JPEG of a bounded size and work; None if it is anything else. Both are known before a pixel is."""
    file = io.BytesIO(content)
    try:
        check_jpeg_scans(file)
        with Image.open(file, formats=["JPEG"]) as image:
            return image.convert("RGB") if max(image.size) <= MAX_PREVIEW_EDGE else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow says of damaged files
        return None
