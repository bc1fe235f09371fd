"""The command ``blip-qformer prepare SRC DST``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..data.photographs import METADATA, Photographs
from ..data.prepare import prepare as prepare_pairs


def add_prepare_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``prepare`` to a parser's commands."""
    parser = commands.add_parser(
        "prepare",
        help="make training pairs, as shards",
        description="Make training pairs of photographs, whose subjects are cut out and put on other backgrounds, and "
        "write them as shards for pretrain. Interrupted, the same command goes on where it was.",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help=f"a folder of photographs with {METADATA}")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write into, made if missing")
    parser.add_argument("--backgrounds", metavar="FOLDER", type=Path, help="pictures to put subjects on")
    parser.add_argument("--segmentation", metavar="FOLDER", type=Path, help="a CLIPSeg, for those without a mask")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is random (0)")
    parser.set_defaults(command=prepare)


def prepare(arguments: argparse.Namespace) -> None:
    """Make pairs of photographs and print how many were made and skipped.

    Args:
        arguments: The parsed arguments of ``prepare``.

    Raises:
        ValueError: A folder is missing or holds something else.
        OSError: The disk is full, or the target cannot be written to.
    """
    if not (arguments.source / METADATA).is_file():
        raise ValueError(f"{arguments.source} has no {METADATA}, which says what is in photographs: write one.")
    if arguments.backgrounds is None:
        raise ValueError("Photographs need other backgrounds: name a folder of pictures with --backgrounds.")
    photographs = Photographs(arguments.source, arguments.backgrounds, arguments.segmentation)
    made = prepare_pairs(
        photographs, arguments.target, arguments.seed, arguments.workers, settings=photographs.settings
    )
    print(f"Wrote {made.pairs} pairs in {made.shards} shards to {arguments.target}.")
    for reason, count in made.skipped.items():
        print(f"Skipped {count}: {reason}.")
