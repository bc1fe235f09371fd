"""The host's model folders: what each drop-down list offers, where a choice lies on disk, what to say if it is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...blip_qformer.checkpoint.components import has_encoder_folder, is_component_folder
from ...blip_qformer.checkpoint.convert import (
    CHECKPOINT_NAME,
    CONTROLNET_FOLDER,
    CONTROLNET_NAME,
    MODEL_FOLDER,
    QFORMER_NAME,
)
from ...blip_qformer.checkpoint.hub_cache import snapshot_folder
from ...blip_qformer.checkpoint.read_tensors import TENSOR_FILES
from ...blip_qformer.subject.file import SUFFIX
from ...blip_qformer.subject.file_name import checked_name

CHECKPOINT_FOLDER, SEGMENTATION_FOLDER = "blip_diffusion", "clipseg"  # ours: the host learns of them from us

DIFFUSERS_FOLDER, SUBJECT_FOLDER = "diffusers", "embeddings"  # the host's own


FileMarks = tuple[tuple[str, int, int], ...]
"""Path, size in bytes and time of change in nanoseconds of each file that belongs to a choice."""


@dataclass(frozen=True)
class ModelList:
    """One drop-down list. The disk is searched anew at each call, because files come and go while the host runs.

    Args:
        kind: What is listed, as in "No ... was found".
        nothing_found: The list's only entry where there is nothing to choose.
        folders: Names under which the host knows the folders that are searched.
        find: Names of all choices.
        locate: Path of a found name; None if it has gone meanwhile.
        advice: How to get such a file, punctuation in front, as it follows "... was found in <folders>".
        first: From a name that is missing to the one thing to do, a sentence that goes in front of all others, as the
            page shows the beginning of an error only. Empty if it is not said by the name what to do.
        beside: From a found name to files that belong to it and are not at its path.
    """

    kind: str
    nothing_found: str
    folders: tuple[str, ...]
    find: Callable[[], Iterable[str]]
    locate: Callable[[str], Path | str | None]
    advice: Callable[[], str]
    first: Callable[[str], str] = lambda name: ""
    beside: Callable[[str], Iterable[Path]] = lambda name: ()

    def options(self) -> list[str]:
        """Return the sorted names for a drop-down list, or one entry that says that there is nothing."""
        return sorted(self.find()) or [self.nothing_found]

    def path(self, name: str) -> Path:
        """Return the path of a listed name; nothing that is not listed can be read.

        Args:
            name: Entry of the drop-down list.

        Raises:
            ValueError: Nothing of that name is there (any more).
        """
        found = self.locate(name) if name in self.find() else None
        if found is None:
            raise ValueError(self.missing(name))
        return Path(found)

    def validate(self, name: str | None) -> bool:
        """Return True if a graph with this choice can be queued.

        Args:
            name: Entry of the drop-down list; None if it comes over a link and is not known yet.

        Raises:
            ValueError: If nothing is there by that name. Raised, because newer pages show this sentence at once, and of
                a refusal that is returned, or of an error at run time, only that there was one.
        """
        if name is not None and name not in self.find():
            raise ValueError(self.missing(name))
        return True

    def fingerprint(self, name: str | None) -> FileMarks:
        """Return what is another value once other files lie under a name; the host then runs the node again.

        Args:
            name: Entry of the drop-down list; None if it comes over a link and is not known yet.
        """
        if name is None or name not in self.find():
            return ()
        return tuple(mark for path in (self.path(name), *self.beside(name)) for mark in file_marks(path))

    def missing(self, name: str) -> str:
        """Return a sentence that says what was looked for, where, and how to get it."""
        what = f"No {self.kind} was found" if name == self.nothing_found else f'"{name}" was not found'
        searched = ", ".join(str(folder) for folder_name in self.folders for folder in _folders(folder_name))
        return f"{self.first(name)} {what} in {searched}{self.advice()}".lstrip()


def file_marks(path: Path) -> FileMarks:
    """Return the marks of a file, or of all files in a folder; none if nothing is there.

    Args:
        path: File or folder.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists())


def register_model_folders() -> None:
    """Make our folders in ``models`` known to the host, beside those of ``extra_model_paths.yaml``."""
    for name in (CHECKPOINT_FOLDER, SEGMENTATION_FOLDER):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))


def new_subject_path(name: str) -> Path:
    """Return where a new subject is saved: in the first embeddings folder, which is made if it does not exist.

    Args:
        name: File name without ending, as a person wrote it.

    Raises:
        ValueError: The name is not safe.
    """
    folder = _folders(SUBJECT_FOLDER)[0]
    path = folder / f"{checked_name(name)}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    return path


def _checkpoints() -> dict[str, Path]:
    """Folders and single files of ours, and BLIP-Diffusion folders among those of diffusers.

    Folders are told by name: a list must not open files of gigabytes to know what they are.
    """
    candidates = []
    for parent in _folders(CHECKPOINT_FOLDER):
        candidates += _models_in(parent)
        candidates += [file for file in parent.glob("*") if file.suffix.lower() in TENSOR_FILES]
    for folder in (folder for parent in _folders(DIFFUSERS_FOLDER) for folder in _models_in(parent)):
        if has_encoder_folder(snapshot_folder(folder)):
            candidates.append(folder)
    found: dict[str, Path] = {}
    for path in candidates:
        found.setdefault(path.name, path)  # of two with one name the first counts, as in the host's own lists
    for name, files in _converted_models().items():
        found.setdefault(name, files[QFORMER_NAME])
    return found


def converted_files(name: str) -> dict[str, Path]:
    """Return the files that a choice stands for, by the names that converting gave them.

    Args:
        name: Entry of the list of checkpoints; what is no converted model gives nothing.
    """
    converted = _converted_models().get(name, {})
    return converted if _checkpoints().get(name) == converted.get(QFORMER_NAME) else {}


def _converted_models() -> dict[str, dict[str, Path]]:
    """The published model as it is downloaded and converted: under the name of its folder, which it stands for."""
    stock = {CHECKPOINT_NAME: "checkpoints", QFORMER_NAME: CHECKPOINT_FOLDER, CONTROLNET_NAME: "controlnet"}
    found = {name: folder_paths.get_full_path(folder, name) for name, folder in stock.items()}
    files = {name: Path(path) for name, path in found.items() if path}
    if not {CHECKPOINT_NAME, QFORMER_NAME} <= files.keys():
        return {}
    return {MODEL_FOLDER: files} | ({CONTROLNET_FOLDER: files} if CONTROLNET_NAME in files else {})


def _first_of_all(name: str) -> str:
    """Say how the model is downloaded, if it is what lacks."""
    if name != CONTROLNET_FOLDER:
        needed = name in (MODEL_FOLDER, QFORMER_NAME) or not _checkpoints()
        return DOWNLOAD_FIRST.format(choice="", option="") if needed else ""
    return DOWNLOAD_FIRST.format(choice=", choose model and ControlNet", option=" --controlnet")


def _segmentation_models() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for parent in _folders(SEGMENTATION_FOLDER):
        # The files of one model, put straight into the folder, are that model.
        for folder in [*([parent] if (parent / "config.json").is_file() else []), *_subfolders(parent)]:
            found.setdefault(folder.name, snapshot_folder(folder))
    return found


def _subjects() -> list[str]:
    """Files in the embeddings folders and their subfolders, named as the host names them."""
    return [name for name in folder_paths.get_filename_list(SUBJECT_FOLDER) if name.lower().endswith(SUFFIX)]


def _folders(name: str) -> list[Path]:
    return [Path(folder) for folder in folder_paths.get_folder_paths(name)]


def _models_in(parent: Path) -> list[Path]:
    """Return the folders that may each be a model; the parent itself where a model's parts lie straight in it."""
    folders = _subfolders(parent)
    models = [folder for folder in folders if not is_component_folder(folder)]
    return models if len(models) == len(folders) else [parent, *models]


def _subfolders(parent: Path) -> list[Path]:
    return [path for path in parent.glob("*") if path.is_dir() and not path.name.startswith(".")]


DOWNLOAD_FIRST = (
    "Download the model first: add the node Download BLIP-Diffusion{choice} and press Run, or run "
    "python -m blip_qformer download{option} in this pack's folder."
)

CHECKPOINTS = ModelList(
    kind="BLIP-Diffusion model",
    nothing_found="(download the model first)",
    folders=(DIFFUSERS_FOLDER, CHECKPOINT_FOLDER),
    find=_checkpoints,
    locate=lambda name: _checkpoints().get(name),
    advice=lambda: (
        ". By hand: put the whole folder https://huggingface.co/Salesforce/blipdiffusion (unet, vae, text_encoder, "
        f"qformer; 6.2 GB) into {_folders(CHECKPOINT_FOLDER)[0] / MODEL_FOLDER}, or an original blip-diffusion folder, "
        "a fine-tuned .pth or a blip2_qformer.safetensors beside it, and press R to refresh."
    ),
    first=_first_of_all,
    beside=lambda name: (path for file, path in converted_files(name).items() if file != QFORMER_NAME),
)

SEGMENTATION_MODELS = ModelList(
    kind="CLIPSeg model",
    nothing_found="(no model found)",
    folders=(SEGMENTATION_FOLDER,),
    find=_segmentation_models,
    locate=lambda name: _segmentation_models().get(name),
    advice=lambda: (
        ": connect a mask instead, or run hf download CIDAS/clipseg-rd64-refined --local-dir "
        f"{_folders(SEGMENTATION_FOLDER)[0] / 'clipseg-rd64-refined'} and press R to refresh."
    ),
)

SUBJECTS = ModelList(
    kind="saved subject",
    nothing_found="(no subject found)",
    folders=(SUBJECT_FOLDER,),
    find=_subjects,
    locate=lambda name: folder_paths.get_full_path(SUBJECT_FOLDER, name),
    advice=lambda: f": make one with Save Subject, or copy a {SUFFIX} there, and press R to refresh.",
)
