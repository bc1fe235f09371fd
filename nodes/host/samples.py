"""The sample pictures of the workflows, copied into the host's input folder, where Load Image looks for them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import folder_paths

from ...blip_qformer.atomic import atomic_file

log = logging.getLogger("blip_diffusion")

SAMPLES = Path(__file__).resolve().parents[2] / "workflows" / "inputs"
SUFFIXES = (".jpg", ".png")


def add_samples() -> None:
    """Copy each sample picture into the host's input folder once, so that every workflow opens with its pictures.

    Which ones have been there is kept in the host's user folder, which an update of the pack leaves alone: a picture
    that someone deleted does not come back. A failure is a warning, because the nodes work without.
    """
    folder = Path(folder_paths.get_input_directory())
    record = Path(folder_paths.get_system_user_directory("blip_diffusion")) / "samples.txt"
    try:
        added = copy_once(SAMPLES, folder, record)
    except OSError as error:
        log.warning(
            "The sample pictures of the workflows could not be copied (%s): copy them from %s to %s by hand.",
            error,
            SAMPLES,
            folder,
        )
        return
    if added:
        log.info("%d sample pictures for the workflows were added to %s; delete them as you like.", len(added), folder)


def copy_once(samples: Path, folder: Path, record: Path) -> list[str]:
    """Copy the pictures of one folder into another, except those that have been there before.

    Args:
        samples: Folder of the pictures.
        folder: Folder to copy them to; a file that is there already is left alone. It is made if missing.
        record: Text file with the names that have been copied or were there, a line each; it is made if missing.

    Returns:
        Names of the pictures that are new in the folder.

    Raises:
        OSError: A folder or a file cannot be written. Without a record nothing is copied.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    added = []
    with record.open("a+", encoding="utf-8", errors="replace") as names:
        names.seek(0)
        known = set(names.read().splitlines())
        for sample in sorted(path for path in samples.glob("*") if path.suffix in SUFFIXES and path.name not in known):
            target = folder / sample.name
            if not os.path.lexists(target):
                with atomic_file(target) as temporary:
                    shutil.copyfile(sample, temporary)
                added.append(sample.name)
            names.write(f"{sample.name}\n")
            names.flush()  # the next copy may fail
    return added
