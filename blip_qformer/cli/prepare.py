"""The command `blip-qformer prepare SRC DST`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mini.world.artwork import LISTING, SPLITS
from mini.world.source import World

from ..data.photographs import METADATA, Photographs
from ..data.prepare import prepare


def add_prepare_command(commands: argparse._SubParsersAction) -> None:
    """Add `prepare` to a parser's commands."""
    parser = commands.add_parser(
        "prepare",
        help="make training pairs, as shards",
        description="Make training pairs and write them as shards for pretrain: of photographs, whose subjects are cut "
        "out and put on other backgrounds, or of artwork, which is put into the places of the small world. "
        "Interrupted, the same command goes on where it was.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help=f"a folder of photographs with {METADATA}, or of artwork with {LISTING}",
    )
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write into, made if missing")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is random (0)")
    photographs = parser.add_argument_group("photographs")
    photographs.add_argument("--backgrounds", metavar="FOLDER", type=Path, help="pictures to put subjects on")
    photographs.add_argument("--segmentation", metavar="FOLDER", type=Path, help="a CLIPSeg, for those without a mask")
    artwork = parser.add_argument_group("artwork")
    artwork.add_argument("--count", metavar="N", type=int, default=10_000, help="how many pairs (10000)")
    artwork.add_argument("--edge", metavar="PIXELS", type=int, default=256, help="of the square pictures (256)")
    artwork.add_argument("--split", choices=SPLITS, default="train", help="which things and styles (train)")
    artwork.add_argument(
        "--alone", action="store_true", help="targets show the subject alone, for the appearance stage"
    )
    parser.set_defaults(command=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    """`prepare`: what was made, and what was skipped why."""
    source = _source(arguments)
    made = prepare(source, arguments.target, arguments.seed, arguments.workers, settings=source.settings)
    print(f"Wrote {made.pairs} pairs in {made.shards} shards to {arguments.target}.")
    for reason, count in made.skipped.items():
        print(f"Skipped {count}: {reason}.")


def _source(arguments: argparse.Namespace) -> World | Photographs:
    """What the pairs are made of, told by the list that lies in the folder."""
    if (arguments.source / LISTING).is_file():
        return World(arguments.source, arguments.split, arguments.count, arguments.edge, arguments.alone)
    if not (arguments.source / METADATA).is_file():
        raise ValueError(
            f"{arguments.source} has neither {METADATA}, which says what is in photographs, nor {LISTING}, which names "
            "artwork: write the one, or fill the folder with mini/world/fetch.py."
        )
    if arguments.backgrounds is None:
        raise ValueError("Photographs need other backgrounds: name a folder of pictures with --backgrounds.")
    return Photographs(arguments.source, arguments.backgrounds, arguments.segmentation)
