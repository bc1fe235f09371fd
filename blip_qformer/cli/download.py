"""The command ``blip-qformer download``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint.convert import CHECKPOINT_NAME, CONTROLNET_NAME, QFORMER_NAME
from .output import byte_progress

LATER = "What was downloaded is kept: run it again, and it goes on where it was."


def add_download_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``download`` to a parser's commands."""
    parser = commands.add_parser(
        "download",
        help="download the published model into ComfyUI's models folders",
        description=f"Download the published model (6.2 GB) and convert it to {CHECKPOINT_NAME} in models/checkpoints "
        f"(2.1 GB) and {QFORMER_NAME} in models/blip_diffusion (1 GB). Load BLIP-Diffusion lists both together as "
        "blipdiffusion. A run that was broken off goes on where it was. HF_ENDPOINT names a mirror, HF_TOKEN a token. "
        "Licence: see https://huggingface.co/Salesforce/blipdiffusion.",
    )
    parser.add_argument(
        "--comfyui",
        type=Path,
        metavar="FOLDER",
        help="the folder of ComfyUI that models is in (the one that this pack is in)",
    )
    parser.add_argument(
        "--controlnet",
        action="store_true",
        help=f"also download the authors' ControlNet for Canny edges (1.4 GB) as {CONTROLNET_NAME} in "
        "models/controlnet (0.7 GB)",
    )
    parser.add_argument(
        "--keep-original",
        action="store_true",
        help="keep the model as it was published too, in models/blip_diffusion/blipdiffusion",
    )
    parser.set_defaults(command=download)


def download(arguments: argparse.Namespace) -> None:
    """Download the model, convert it, and print what was done.

    Args:
        arguments: The parsed arguments of ``download``.

    Raises:
        OSError: There is too little room, or a folder cannot be written to.
        ValueError: There is no ComfyUI, or something could not be fetched or converted.
    """
    from ..download import download_model, find_comfyui, model_folders  # with huggingface_hub, for this alone

    folders = model_folders(find_comfyui(arguments.comfyui))
    try:
        download_model(
            folders,
            byte_progress,
            print,
            controlnet=arguments.controlnet,
            keep_original=arguments.keep_original,
        )
    except KeyboardInterrupt:
        print(LATER)
        raise
    print("Press R in ComfyUI, and choose blipdiffusion in Load BLIP-Diffusion.")
