"""Where checkpoints are looked for, and what to say when there is none."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...blip_qformer.checkpoint.read_tensors import TENSOR_FILES

FOLDER = "blip_diffusion"


SEGMENTATION_FOLDER = "clipseg"


NOTHING_FOUND = "(no model found)"


# Subfolders of the two published layouts; a list must not open files of gigabytes to know what they are.
_SIGNS = ("qformer", "blip_model")


def register_model_folder() -> None:
    """Make our folders in ``models`` known to the host, beside those of ``extra_model_paths.yaml``."""
    for name in (FOLDER, SEGMENTATION_FOLDER):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))


def list_checkpoints() -> list[str]:
    """Names for a drop-down list: folders and single files; one that says so where there is nothing."""
    return sorted(_found()) or [NOTHING_FOUND]


def checkpoint_path(name: str) -> Path:
    """The path of a listed checkpoint.

    Raises:
        ValueError: nothing of that name is there (any more).
    """
    found = _found()
    if name not in found:
        raise ValueError(missing_checkpoint(name))
    return found[name]


def missing_checkpoint(name: str | None) -> str:
    """A sentence that says what was looked for, where, and where to get it."""
    what = "No BLIP-Diffusion model was found" if name in (None, NOTHING_FOUND) else f'"{name}" was not found'
    searched = ", ".join(str(folder) for folder in _folders("diffusers") + _folders(FOLDER))
    return (
        f"{what} in {searched}. Download the whole folder https://huggingface.co/Salesforce/blipdiffusion (unet, vae, "
        f"text_encoder, qformer; 6.2 GB) into {_folders(FOLDER)[0]}, or put an original blip-diffusion folder, a "
        "fine-tuned .pth or a blip2_qformer.safetensors there, and press R to refresh."
    )


def list_segmentation_models() -> list[str]:
    """Names of CLIPSeg folders for a drop-down list; one that says so where there is none."""
    return sorted(_segmentation_models()) or [NOTHING_FOUND]


def segmentation_model_path(name: str) -> Path:
    """The path of a listed CLIPSeg folder.

    Raises:
        ValueError: nothing of that name is there (any more).
    """
    found = _segmentation_models()
    if name not in found:
        searched = ", ".join(str(folder) for folder in _folders(SEGMENTATION_FOLDER))
        what = "No CLIPSeg model was found" if name == NOTHING_FOUND else f'"{name}" was not found'
        target = _folders(SEGMENTATION_FOLDER)[0] / "clipseg-rd64-refined"
        raise ValueError(
            f"{what} in {searched}: connect a mask instead, or run hf download CIDAS/clipseg-rd64-refined --local-dir "
            f"{target} and press R to refresh."
        )
    return found[name]


def _segmentation_models() -> dict[str, Path]:
    return {folder.name: folder for parent in _folders(SEGMENTATION_FOLDER) for folder in _subfolders(parent)}


def _found() -> dict[str, Path]:
    candidates = []
    for parent in _folders(FOLDER):
        candidates += _subfolders(parent)
        candidates += [file for file in parent.glob("*") if file.suffix.lower() in TENSOR_FILES]
    candidates += [folder for parent in _folders("diffusers") for folder in _subfolders(parent) if _is_ours(folder)]
    found: dict[str, Path] = {}
    for path in candidates:
        found.setdefault(path.name, path)  # of two with one name the first is taken, as the host does
    return found


def _folders(name: str) -> list[Path]:
    return [Path(folder) for folder in folder_paths.get_folder_paths(name)]


def _subfolders(parent: Path) -> list[Path]:
    return [path for path in parent.glob("*") if path.is_dir() and not path.name.startswith(".")]


def _is_ours(folder: Path) -> bool:
    return any((folder / sign).is_dir() for sign in _SIGNS)
