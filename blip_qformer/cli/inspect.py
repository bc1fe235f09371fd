"""The command ``blip-qformer inspect PATH``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.detect import Kind, describe, detect_kind
from ..checkpoint.ldm_keys import CONVERSIONS, network_to_ldm
from ..checkpoint.read_tensors import read_tensors
from ..checkpoint.write_safetensors import data_size
from .output import format_bytes, format_table

TITLES = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "VAE", "controlnet": "ControlNet"}
HEADER = ("part", "file", "tensors", "parameters", "dtype", "size")
COMPLETE = (Kind.QFORMER, Kind.FINETUNED)  # kinds of file that are a checkpoint by themselves


def add_inspect_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``inspect`` to a parser's commands."""
    parser = commands.add_parser(
        "inspect",
        help="say what a checkpoint is and what it holds",
        description="Say what a checkpoint is, and for each part of it the file, sizes and precision.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a folder or a file")
    parser.set_defaults(command=inspect)


def inspect(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint is, a table of its components and the sizes of its subject encoder.

    Of a file of tensors that is no checkpoint by itself, print what it is and how large.

    Args:
        arguments: The parsed arguments of ``inspect``.

    Raises:
        ValueError: The path is no file of tensors and no checkpoint.
    """
    path = arguments.path
    if path.is_file() and detect_kind(tensors := read_tensors(path)) not in COMPLETE:
        print(f"{path}: {describe(tensors)}\n\n{_table([('all of it', path.name, *_measures(tensors))])}")
        return

    checkpoint = open_checkpoint(path)
    table = _table(_component_rows(checkpoint))  # before anything is printed, as reading can fail
    print(f"{checkpoint.path}: {checkpoint.format}\n\n{table}")
    print("\nsubject encoder")
    for name, sizes in checkpoint.encoder_config.to_dict().items():
        print(f"  {name}: {_one_line(sizes)}")
    for problem in [*checkpoint.problems, *_conversion_problems(checkpoint)]:
        print(f"\nNote: {problem}")


def _component_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, ...]]:
    """Yield the table's row of each component that a checkpoint has."""
    yield "subject encoder", _relative(checkpoint.encoder_path, checkpoint), *_measures(checkpoint.encoder_state_dict)
    for name, title in TITLES.items():
        if component := getattr(checkpoint, name):
            yield title, _relative(component.path, checkpoint), *_measures(component.state_dict())
    if checkpoint.subject is not None:
        yield "tuned subject", "", *_measures({"subject": checkpoint.subject})


def _conversion_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a sentence for each network that lacks tensors or holds unknown ones."""
    for name in CONVERSIONS:
        if component := getattr(checkpoint, name):
            try:
                network_to_ldm(name, component.state_dict(), component.config)
            except ValueError as error:
                yield f"{_relative(component.path, checkpoint)}: {error}"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    return format_table([HEADER, *rows], right_aligned={"tensors", "parameters", "size"})


def _measures(tensors: Mapping[str, Tensor]) -> tuple[str, str, str, str]:
    """Return the number of tensors, the number of parameters, the dtypes and the size in bytes, as text."""
    parameters = sum(tensor.numel() for tensor in tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return str(len(tensors)), f"{parameters:,}", ", ".join(dtypes), format_bytes(data_size(tensors))


def _relative(file: Path, checkpoint: Checkpoint) -> str:
    """Return a file's path relative to the checkpoint's folder."""
    return file.relative_to(checkpoint.path).as_posix() if checkpoint.path in file.parents else file.name


def _one_line(value: object) -> str:
    """Format a value of a configuration, or a group of them, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)
