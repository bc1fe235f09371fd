"""Import optional packages, which ComfyUI does not bring, where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

#: Module -> package, if its name is another one.
PACKAGES = {"yaml": "pyyaml"}


def import_extra(name: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        name: The name of the module.
        purpose: What needs it, as the subject of the error message.

    Returns:
        The module.

    Raises:
        ValueError: The package is not installed; the message says what it is for and how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        module = name.partition(".")[0]
        package = PACKAGES.get(module, module)
        raise ValueError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): run pip install {package}."
        ) from error
