"""Image files that are not what they say."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def bomb(edge: int) -> bytes:
    """A PNG of a few bytes that says it has edge x edge pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def damaged_avif() -> bytes:
    """An AVIF that was cut off."""
    content = io.BytesIO()
    Image.effect_noise((80, 80), 50).convert("RGB").save(content, "AVIF")
    return content.getvalue()[:-200]


def jpeg(**options) -> bytes:
    """Noise of 64 x 64 pixels as a JPEG, with options of Pillow."""
    content = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(content, "JPEG", **options)
    return content.getvalue()


def with_scans(content: bytes, count: int) -> bytes:
    """Repeat the last scan of a progressive JPEG."""
    begin = content.rindex(b"\xff\xda")
    return content[:begin] + content[begin:-2] * count + content[-2:]
