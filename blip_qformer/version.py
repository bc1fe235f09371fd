"""The version, which is written in pyproject.toml and nowhere else: the Comfy registry reads it there."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def read_version() -> str:
    """Read the version of the pack that this library lies in, or of the installed distribution.

    In a host the pack is a folder that nobody installed; a wheel has no pyproject.toml beside the library.

    Returns:
        The version, like ``"0.1.0"``, or ``"unknown"`` if the library was copied out of the pack.
    """
    if PYPROJECT.is_file():
        text = PYPROJECT.read_text(encoding="utf-8")
        found = re.search(r'^name = "blip-diffusion"\nversion = "(.+)"$', text, flags=re.MULTILINE)
        if found:
            return found[1]
    try:
        return importlib.metadata.version("blip-diffusion")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
