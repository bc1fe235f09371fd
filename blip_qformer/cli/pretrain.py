"""The command ``blip-qformer pretrain CONFIG``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.shards import ALLOWED
from ..extras import import_extra
from ..training.config import RunConfig, read_config

EXTRAS = ("accelerate", "diffusers", "transformers", "yaml", "webdataset")


def add_pretrain_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``pretrain`` to a parser's commands."""
    parser = commands.add_parser(
        "pretrain",
        help="train a stage from a run's file",
        description="Train one stage as a run's YAML file says. Killed and started again, it goes on from its last "
        "checkpoint. For several GPUs or machines: accelerate launch -m blip_qformer pretrain CONFIG.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a run's YAML file")
    parser.add_argument("--steps", metavar="N", type=int, help="stop there for today; without it, the run goes on")
    parser.add_argument(
        "--allow",
        metavar="WHAT",
        choices=ALLOWED,
        action="append",
        default=[],
        help="what the run's pairs may do besides being files, if you trust the run's file: urls fetches shards from "
        "servers, commands runs the shell commands of pipe: sources; may be given twice (neither)",
    )
    parser.set_defaults(command=pretrain)


def pretrain(arguments: argparse.Namespace) -> None:
    """Train a stage and print where the model is.

    Args:
        arguments: The parsed arguments of ``pretrain``.

    Raises:
        ValueError: A package is missing, or the run's file cannot be used.
        OSError: A file cannot be read or written.
    """
    for name in EXTRAS:
        import_extra(name, "Training")
    from ..training.trainer import train  # its imports are optional packages

    model = train(read_run(arguments.config), arguments.steps, allow=arguments.allow)
    print(f"The trained model is in {model}.")


def read_run(file: Path) -> RunConfig:
    """Read a run's file, and check its stage and the stage's options too, which the training reads.

    Args:
        file: The run's YAML file.

    Raises:
        ValueError: The file, its stage or one of the options cannot be used; the file is named.
        OSError: The file cannot be read.
    """
    from ..training.stages import find_stage, read_options  # their imports are optional packages

    config = read_config(file)
    try:
        read_options(find_stage(config.stage), config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config
