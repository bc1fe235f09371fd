"""The host's folders of embeddings, where subjects are kept: what is there, and where a new one goes."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...blip_qformer.subject.file import ENDING
from ...blip_qformer.subject.file_name import checked_name

FOLDER = "embeddings"


NOTHING_FOUND = "(no subject found)"


def list_subjects() -> list[str]:
    """Names for a drop-down list, from all folders and their subfolders; one that says so where there is nothing."""
    return _found() or [NOTHING_FOUND]


def subject_path(name: str) -> Path:
    """The path of a listed file; only what is listed can be read.

    Raises:
        ValueError: nothing of that name is there (any more).
    """
    path = folder_paths.get_full_path(FOLDER, name) if name in _found() else None
    if path is None:
        raise ValueError(missing_subject(name))
    return Path(path)


def missing_subject(name: str | None) -> str:
    """A sentence that says what was looked for, where, and how one gets there."""
    what = "No saved subject was found" if name in (None, NOTHING_FOUND) else f'"{name}" was not found'
    searched = ", ".join(str(folder) for folder in folder_paths.get_folder_paths(FOLDER))
    return f"{what} in {searched}: make one with Save Subject, or copy a {ENDING} there, and press R to refresh."


def new_subject_path(name: str) -> Path:
    """Where a subject of this name is saved: directly in the first folder of embeddings, which is made if need be.

    Raises:
        ValueError: the name is not safe.
    """
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    path = folder / f"{checked_name(name)}{ENDING}"
    folder.mkdir(parents=True, exist_ok=True)
    return path


def _found() -> list[str]:
    return sorted(name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(ENDING))
