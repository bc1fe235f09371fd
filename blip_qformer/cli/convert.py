"""The command ``blip-qformer convert SRC DST``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..checkpoint import open_checkpoint, save_qformer
from ..checkpoint.convert import (
    CHECKPOINT_NAME,
    CONTROLNET_NAME,
    QFORMER_NAME,
    controlnet_weights,
    stable_diffusion_weights,
)
from ..checkpoint.weights import check_finite
from ..checkpoint.write_safetensors import check_free_space, check_target, data_size, write_safetensors
from .output import byte_progress, format_bytes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def add_convert_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``convert`` to a parser's commands."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint's Stable Diffusion, Q-Former and ControlNet as .safetensors files",
        description=f"Write {CHECKPOINT_NAME}, which the stock CheckpointLoaderSimple loads, and {QFORMER_NAME}; from "
        f"a source with a ControlNet also {CONTROLNET_NAME}, which the stock ControlNetLoader loads.",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a Hub folder, original folder or fine-tuned file")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write into, made if missing")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="precision of the files (float16)")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there already")
    parser.set_defaults(command=convert)


def convert(arguments: argparse.Namespace) -> None:
    """Write the files of a checkpoint and print what was written.

    Everything that can be wrong, except a value too large for the dtype, is checked before anything is written.

    Args:
        arguments: The parsed arguments of ``convert``.

    Raises:
        OSError: A file exists already, or the disk has too little room.
        ValueError: The checkpoint cannot be opened or converted.
    """
    checkpoint = open_checkpoint(arguments.source)
    check_finite(checkpoint.encoder_state_dict, checkpoint.encoder_path)
    folder, dtype, force = arguments.target, DTYPES[arguments.dtype], arguments.force
    stable_diffusion, departures = stable_diffusion_weights(checkpoint)
    files = {CHECKPOINT_NAME: stable_diffusion, CONTROLNET_NAME: controlnet_weights(checkpoint.controlnet)}
    networks = {name: weights for name, weights in files.items() if weights}
    _check_folder(folder, [QFORMER_NAME, *networks], force)
    written = [checkpoint.encoder_state_dict, *networks.values()]
    check_free_space(_nearest_existing(folder), sum(data_size(weights, dtype) for weights in written))

    folder.mkdir(parents=True, exist_ok=True)
    for name, weights in networks.items():
        path = folder / name
        with byte_progress(name, data_size(weights, dtype)) as progress:
            metadata = {"format": "pt"}
            write_safetensors(path, weights, metadata=metadata, dtype=dtype, overwrite=force, progress=progress)
        print(f"Wrote {path} ({format_bytes(path.stat().st_size)}, {arguments.dtype}).")
    if departures:
        print(f"Note: CheckpointLoaderSimple loads only SD1.5's own sizes, and this has {', '.join(departures)}.")
    if not stable_diffusion:
        print(f"{checkpoint.path} ({checkpoint.format}) has no U-Net, so there is no {CHECKPOINT_NAME} to write.")
    if CONTROLNET_NAME in networks:
        print(f"{CONTROLNET_NAME} goes into models/controlnet, for the stock ControlNetLoader.")

    path = folder / QFORMER_NAME
    weights, config = checkpoint.encoder_state_dict, checkpoint.encoder_config
    with byte_progress(path.name, data_size(weights, dtype)) as progress:
        save_qformer(path, weights, config, dtype=dtype, overwrite=force, progress=progress)
    print(f"Wrote {path} ({format_bytes(path.stat().st_size)}, {arguments.dtype}).")
    if checkpoint.subject is not None:
        shape = list(checkpoint.subject.shape)
        print(f"Note: {checkpoint.path} also holds a tuned subject {shape}, which Load Tuned Subject takes from it.")
    for problem in checkpoint.problems:  # such as a ControlNet that cannot be read and so was not written
        print(f"Note: {problem}")


def _check_folder(folder: Path, names: list[str], overwrite: bool) -> None:
    """Raise OSError if one of these files may not be written into the folder, which need not exist yet."""
    existing = _nearest_existing(folder)
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file, and a folder is to be written there: choose another name.")
    if folder.is_dir():
        for name in names:
            check_target(folder / name, overwrite=overwrite)


def _nearest_existing(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
