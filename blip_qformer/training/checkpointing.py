"""Checkpoints of a run: written whole or not at all, and found again after the run was killed.

accelerate's own naming and rotation (``ProjectConfiguration``) would remove old checkpoints before the new one is
written, and write it under its final name: on a full disk, or killed meanwhile, a run would have nothing to go on from.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from ..atomic import flush, publish_folder, remove_folder, remove_partial, shared_partial
from ..limits import MAX_CONFIG_BYTES, MAX_COUNT
from ..plain_data import parse_json, read_bytes

KEPT = 2  # the newest, and one before it

PREFIX = "step-"

RUN_FILE = "run.json"
OUR_STATE = "custom_checkpoint_*.pkl"  # accelerate's name for what it is asked to save besides its own


def find_latest(folder: Path, accelerator: Accelerator) -> Path | None:
    """Find the checkpoint that all processes go on from, and remove what a killed run was writing.

    Args:
        folder: Folder of the run's checkpoints, made if missing.
        accelerator: Accelerator of this process.

    Returns:
        The checkpoint's own folder, or None.

    Raises:
        ValueError: The processes see different ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_partial(folder, exclusive=True)
    accelerator.wait_for_everyone()
    latest = latest_checkpoint(folder)
    step = torch.tensor([_step(latest) if latest else 0], device=accelerator.device)
    seen = cast(Tensor, accelerator.gather(step)).tolist()
    if len(set(seen)) > 1:
        raise ValueError(
            f"The newest checkpoint in {folder} is that of step {max(seen)} for some processes and of step {min(seen)} "
            "for others: choose an output that all machines share."
        )
    return latest


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder, or None."""
    return max(_checkpoints(folder), key=_step, default=None)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, data_order: Mapping[str, Any]) -> Path:
    """Write everything a run needs to go on, in all processes together.

    It is written under a temporary name and renamed when complete; only then are older ones removed.

    Args:
        accelerator: Accelerator of this process.
        folder: Folder of the run's checkpoints.
        step: Steps that were done.
        data_order: Settings that decide which pair comes when; a run that goes on must have the same.

    Returns:
        The checkpoint's own folder.

    Raises:
        OSError: The disk is full, or the folder cannot be written to; the checkpoint before it stays.
    """
    path = folder / f"{PREFIX}{step:08d}"
    partial = shared_partial(path)
    problem: Exception | None = None
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            state = {"step": step, "processes": accelerator.num_processes, **data_order}
            (partial / RUN_FILE).write_text(json.dumps(state), encoding="utf-8")
        flush(partial)
    except (OSError, RuntimeError, SafetensorError) as error:  # what Python, torch and safetensors make of a full disk
        problem = error
    if _in_any_process(accelerator, problem is not None):
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest_checkpoint(folder)
        raise OSError(
            f"The checkpoint of step {step} could not be written to {folder} ({problem or 'another process failed'}): "
            f"make room there and start the run again, it goes on from {kept.name if kept else 'the beginning'}."
        ) from problem
    if accelerator.is_main_process:
        publish_folder(path)
        for old in sorted(_checkpoints(folder), key=_step)[:-KEPT]:
            remove_folder(old)
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(accelerator: Accelerator, path: Path, data_order: Mapping[str, Any]) -> int:
    """Load a checkpoint into all that the accelerator wraps. A pickle in it that would run code is not opened.

    Args:
        accelerator: Accelerator of this process.
        path: The checkpoint's own folder.
        data_order: Settings that decide which pair comes when.

    Returns:
        Steps that were done.

    Raises:
        ValueError: The run that wrote the checkpoint reads the pairs in another order, or has another model.
    """
    state = _read_state(path / RUN_FILE)
    for name, ours in {"processes": accelerator.num_processes, **data_order}.items():
        if (written := state.get(name, ours)) != ours:
            raise ValueError(
                f"{path} was written with {name} {written} and cannot be taken up with {ours}, which reads the pairs "
                "in another order: set it back, or choose another output to begin anew."
            )
    try:
        for file in path.glob(OUR_STATE):
            torch.load(file, map_location="cpu", weights_only=True)  # accelerate would let this one run code
        accelerator.load_state(str(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds a pickle that is damaged or would run code, so it was left closed: go on from a checkpoint "
            "of your own, or choose another output to begin anew."
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit this run ({reason}): choose another output to begin anew.") from error
    return state["step"]


def _read_state(file: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote about a run; ValueError if it is something else."""
    state = parse_json(read_bytes(file, MAX_CONFIG_BYTES), str(file))
    if not isinstance(state, dict) or type(state.get("step")) is not int or not 0 <= state["step"] <= MAX_COUNT:
        raise ValueError(f"{file} does not say which step it is of: choose another output to begin anew.")
    return state


def _in_any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether something happened in at least one of the processes; all wait for the answer."""
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)))


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))
