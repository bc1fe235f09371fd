"""Find the ComfyUI that the pack sits in, and its folders for models. Inside ComfyUI, ComfyUI itself knows them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).absolute().parent.parent.parent


@dataclass(frozen=True)
class ModelFolders:
    """Where ComfyUI looks for models.

    Args:
        checkpoints: Of *Load Checkpoint*.
        blip_diffusion: Of this pack's loaders; what is not yet converted lies here too, in a hidden folder.
        controlnet: Of *Load ControlNet Model*.
    """

    checkpoints: Path
    blip_diffusion: Path
    controlnet: Path


def find_comfyui(path: Path | None = None) -> Path:
    """Return the folder of ComfyUI that has ``custom_nodes`` and ``models`` in it.

    Args:
        path: This folder, or a portable one with ComfyUI in it. None looks upwards from the pack's own folder and then
            from the working directory.

    Raises:
        ValueError: There is no ComfyUI.
    """
    if path is not None:
        found = _comfyui_in(path)
        if found is None:
            raise ValueError(
                f"{path} is no folder of ComfyUI, which has custom_nodes and main.py or models in it: name the one "
                "that your models folder is in."
            )
        return found
    # A pack that is linked into custom_nodes is elsewhere, but the shell still knows by which way one came to it.
    for start in (PACK, Path(os.environ.get("PWD", ".")).absolute(), Path.cwd()):
        for folder in start.parents:
            if _is_comfyui(folder):
                return folder
    raise ValueError(
        f"No ComfyUI was found around {PACK}: add --comfyui and its folder, the one that your models folder is in."
    )


def model_folders(comfyui: Path) -> ModelFolders:
    """Return the folders for models of a ComfyUI.

    Args:
        comfyui: Its folder.
    """
    models = comfyui / "models"
    return ModelFolders(models / "checkpoints", models / "blip_diffusion", models / "controlnet")


def _comfyui_in(path: Path) -> Path | None:
    """Return the folder itself, or ComfyUI in a portable one."""
    return next((folder for folder in (path, path / "ComfyUI") if _is_comfyui(folder)), None)


def _is_comfyui(folder: Path) -> bool:
    """Return whether a folder is ComfyUI's; the desktop application has no main.py beside the user's models."""
    return (folder / "custom_nodes").is_dir() and ((folder / "main.py").is_file() or (folder / "models").is_dir())
