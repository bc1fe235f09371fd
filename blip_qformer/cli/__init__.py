"""The command line: one module per command, parsed and run by ``command_line``."""

from .command_line import main

__all__ = ["main"]
