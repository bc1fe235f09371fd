"""The download of the model under ComfyUI's progress bar and Cancel button, into ComfyUI's folders for models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from server import PromptServer

from ...blip_qformer.checkpoint.convert import CHECKPOINT_NAME, CONTROLNET_NAME, QFORMER_NAME
from ...blip_qformer.download import ModelFolders, download_model, wanted_files
from .model_paths import CHECKPOINT_FOLDER, FileMarks, file_marks


def host_folders() -> ModelFolders:
    """Return the host's folder for each kind: the one that has the file already, or the first."""
    return ModelFolders(
        _folder("checkpoints", CHECKPOINT_NAME),
        _folder(CHECKPOINT_FOLDER, QFORMER_NAME),
        _folder("controlnet", CONTROLNET_NAME),
    )


def download(controlnet: bool, keep_original: bool, node: str | None) -> list[str]:
    """Download and convert what is not there yet.

    Args:
        controlnet: Whether to add the ControlNet for Canny edges.
        keep_original: Whether to keep what was published beside what is made of it.
        node: Id of the node that shows what is being done; None shows it nowhere.

    Returns:
        What was done, a sentence each.

    Raises:
        ValueError: Something could not be fetched.
        OSError: There is too little room, or a folder cannot be written to.
        InterruptProcessingException: The user has cancelled; the next run goes on from there.
    """
    done: list[str] = []
    progress = partial(_progress, node)
    download_model(host_folders(), progress, done.append, controlnet=controlnet, keep_original=keep_original)
    return done


def show_text(node: str | None, text: str) -> None:
    """Show a text on a node, as the stock Get Image Size does.

    Args:
        node: Id of the node; None shows it nowhere.
        text: Text in place of the one before.
    """
    server = getattr(PromptServer, "instance", None)
    if node is not None and server is not None:
        server.send_progress_text(text, node)


def download_marks(controlnet: bool) -> FileMarks:
    """Return what is another value once a downloaded file has come, gone or changed.

    Args:
        controlnet: Whether the ControlNet is wanted too.
    """
    return tuple(mark for file in wanted_files(host_folders(), controlnet) for mark in file_marks(file))


def _folder(kind: str, name: str) -> Path:
    found = folder_paths.get_full_path(kind, name)
    return Path(found).parent if found else Path(folder_paths.get_folder_paths(kind)[0])


@contextmanager
def _progress(node: str | None, title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show the bytes of one file on the node, and stop where the user has cancelled."""
    bar, done = comfy.utils.ProgressBar(max(total, 1)), 0

    def update(count: int) -> None:
        nonlocal done
        done += count
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)
        show_text(node, f"{title}: {done / 10**9:.2f} of {total / 10**9:.2f} GB")

    yield update
