"""The command `blip-qformer pretrain CONFIG`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..extras import import_extra
from ..training.config import read_config

EXTRAS = ("accelerate", "diffusers", "transformers", "yaml", "webdataset")


def add_pretrain_command(commands: argparse._SubParsersAction) -> None:
    """Add `pretrain` to a parser's commands."""
    parser = commands.add_parser(
        "pretrain",
        help="train a stage from a run's file",
        description="Train one stage as a run's YAML file says. Killed and started again, it goes on from its last "
        "checkpoint. For several GPUs or machines: accelerate launch -m blip_qformer pretrain CONFIG.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a file such as mini/runs/2-vision.yaml")
    parser.add_argument("--steps", metavar="N", type=int, help="stop there for today; without it, the run goes on")
    parser.set_defaults(command=_pretrain)


def _pretrain(arguments: argparse.Namespace) -> None:
    """`pretrain`: train, and say where the model is."""
    for name in EXTRAS:
        import_extra(name, "Training")
    from ..training.trainer import train  # what it imports may be missing on a machine that only draws

    print(f"The trained model is in {train(read_config(arguments.config), arguments.steps)}.")
