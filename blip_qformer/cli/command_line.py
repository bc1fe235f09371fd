"""The command line: ``blip-qformer download | convert | inspect | prepare | pretrain | finetune``.

A command is a function of its parsed arguments: it prints what it did and raises what went wrong. :func:`run_command`
turns an exception into one line on stderr and an exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..version import read_version
from .convert import add_convert_command
from .download import add_download_command
from .finetune import add_finetune_command
from .inspect import add_inspect_command
from .prepare import add_prepare_command
from .pretrain import add_pretrain_command

FAILED = 2
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``blip-qformer`` with arguments, those of this process if None; see :func:`run_command`."""
    parser = argparse.ArgumentParser(prog="blip-qformer", description="BLIP-Diffusion's weights on the command line.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {read_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_download_command(commands)
    add_convert_command(commands)
    add_inspect_command(commands)
    add_prepare_command(commands)
    add_pretrain_command(commands)
    add_finetune_command(commands)
    return run_command(parser, argv)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run the command they name.

    Args:
        parser: A parser whose commands set ``command`` to a function of the parsed arguments.
        argv: Arguments without the program's name; those of this process if None.

    Returns:
        The exit code: 0; 2, with one line on stderr, if the command failed; 130 if it was interrupted.
    """
    arguments = parser.parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError) as error:  # a CheckpointError is a ValueError
        print(f"{parser.prog}:", " ".join(str(error).split()), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing half-written was left behind.", file=sys.stderr)
        return INTERRUPTED
    return 0
