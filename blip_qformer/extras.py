"""Packages that ComfyUI does not bring, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

#: Modules whose package has another name.
PACKAGES = {"yaml": "pyyaml"}


def import_extra(name: str, purpose: str) -> ModuleType:
    """An optional package, or a sentence that says what it is for and how to get it.

    Args:
        name: of the module; ``purpose``: what needs it, as the sentence's subject.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        module = name.partition(".")[0]
        package = PACKAGES.get(module, module)
        raise ValueError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): run pip install {package}."
        ) from error
