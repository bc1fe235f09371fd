"""Training examples on disk, and the endless stream that training reads them from.

A *pair* is one example: a thing on another background, the photograph it was cut from, the word for the thing, and a
caption of the photograph. Its files are ``{key}.subject.webp``, ``{key}.target.webp`` and ``{key}.json``; they lie in a
folder, or one after the other in *shards*, tar archives as webdataset has them, which stream from a bucket as well.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, to be written to: it becomes ``path`` at the end, or disappears on failure."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after the rename there is none
