"""BLIP-Diffusion as a library: subject encoder, prompts, attention edits and training, without ComfyUI.

>>> from blip_qformer import load_subject_encoder
>>> from blip_qformer.encoder import preprocess
>>> encoder = load_subject_encoder("models/blip_diffusion/blipdiffusion")
>>> vectors = encoder(preprocess(images), ["dog"])  # [1, 16, 768]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .version import read_version

if TYPE_CHECKING:
    from .checkpoint import load_subject_encoder
    from .subject import Subject

__all__ = ["Subject", "__version__", "load_subject_encoder"]

__version__ = read_version()

# Imported when they are asked for, so that the command line can say that torch is missing.
_EXPORTS = {"Subject": ".subject", "load_subject_encoder": ".checkpoint"}


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
