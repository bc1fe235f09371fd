"""Packages that ComfyUI does not bring, imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

#: Modules whose package has another name.
PACKAGES = {"yaml": "pyyaml"}

#: What the stages of training need, the extra ``training`` of pyproject.toml.
TRAINING = ("accelerate", "diffusers", "yaml", "tensorboard", "webdataset")


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
        package = _package(name)
        raise ValueError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): run pip install {package}."
        ) from error


def require_training() -> None:
    """Make sure of all packages that a run needs, before any of its modules is imported.

    Raises:
        ValueError: some are not installed.
    """
    if missing := [_package(name) for name in TRAINING if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"Training needs {', '.join(missing)}, which ComfyUI does not bring: run pip install {' '.join(missing)}."
        )


def _package(module: str) -> str:
    """What pip calls the package of a module."""
    name = module.partition(".")[0]
    return PACKAGES.get(name, name)
