"""The command line: `blip-qformer convert | inspect | prepare | pretrain | finetune | evaluate`.

A command is a function of its parsed arguments that prints what it did and raises what went wrong; `main` turns what it
raises into one line and an exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mini.evaluation.command import add_evaluate_command

from ..checkpoint import Checkpoint, open_checkpoint, save_qformer
from ..checkpoint.detect import Kind, describe, detect_kind
from ..checkpoint.ldm_config import check_depth, departures_from_stock
from ..checkpoint.ldm_keys import CONVERSIONS, network_to_ldm, stable_diffusion_checkpoint
from ..checkpoint.read_tensors import read_tensors
from ..checkpoint.write_safetensors import check_free_space, check_target, data_size, write_safetensors
from .finetune import add_finetune_command
from .prepare import add_prepare_command
from .pretrain import add_pretrain_command

CHECKPOINT_NAME = "blip_diffusion_sd15.safetensors"


QFORMER_NAME = "blip2_qformer.safetensors"


CONTROLNET_NAME = "blip_diffusion_controlnet.safetensors"


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


# The parts of a checkpoint that make Stable Diffusion, and what a person calls them.
NETWORKS = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "VAE"}


WHOLE = (Kind.QFORMER, Kind.FINETUNED)  # the kinds of file that are a checkpoint by themselves


FAILED = 2


INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code is 0, or 2 with one line on stderr if it could not do its work.

    argv: the words after the program's name, those of this process if None.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError) as error:  # a CheckpointError is a ValueError
        print("blip-qformer:", " ".join(str(error).split()), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("blip-qformer: interrupted; nothing half-written was left behind.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blip-qformer", description="BLIP-Diffusion's weights on the command line.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint's Stable Diffusion, Q-Former and ControlNet as .safetensors files",
        description=f"Write {CHECKPOINT_NAME}, which the stock CheckpointLoaderSimple loads, and {QFORMER_NAME}; from "
        f"a source with a ControlNet also {CONTROLNET_NAME}, which the stock ControlNetLoader loads.",
    )
    convert.add_argument("source", metavar="SRC", type=Path, help="a Hub folder, original folder or fine-tuned file")
    convert.add_argument("target", metavar="DST", type=Path, help="the folder to write into, made if missing")
    convert.add_argument("--dtype", choices=DTYPES, default="float16", help="precision of the files (float16)")
    convert.add_argument("--force", action="store_true", help="overwrite files that are there already")
    convert.set_defaults(command=_convert)

    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint is and what it holds",
        description="Say what a checkpoint is, and for each part of it the file, sizes and precision.",
    )
    inspect.add_argument("path", metavar="PATH", type=Path, help="a folder or a file")
    inspect.set_defaults(command=_inspect)

    add_prepare_command(commands)
    add_pretrain_command(commands)
    add_finetune_command(commands)
    add_evaluate_command(commands)
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    """`convert`: all that can be wrong, short of a value too large for the dtype, is looked for before any writing."""
    checkpoint = open_checkpoint(arguments.source)
    folder, dtype, force = arguments.target, DTYPES[arguments.dtype], arguments.force
    stable_diffusion, departures = _stable_diffusion(checkpoint)
    files = {CHECKPOINT_NAME: stable_diffusion, CONTROLNET_NAME: _controlnet(checkpoint)}
    networks = {name: weights for name, weights in files.items() if weights}
    _check_folder(folder, [QFORMER_NAME, *networks], force)
    written = [checkpoint.encoder_weights, *networks.values()]
    check_free_space(_nearest_folder(folder), sum(data_size(weights, dtype) for weights in written))

    folder.mkdir(parents=True, exist_ok=True)
    for name, weights in networks.items():
        path = folder / name
        with _progress(name, data_size(weights, dtype)) as progress:
            metadata = {"format": "pt"}
            write_safetensors(path, weights, metadata=metadata, dtype=dtype, overwrite=force, progress=progress)
        print(f"Wrote {path} ({_bytes(path.stat().st_size)}, {arguments.dtype}).")
    if departures:
        print(f"Note: CheckpointLoaderSimple loads only SD1.5's own sizes, and this has {', '.join(departures)}.")
    if not stable_diffusion:
        print(f"{checkpoint.path} ({checkpoint.format}) has no U-Net, so there is no {CHECKPOINT_NAME} to write.")
    if CONTROLNET_NAME in networks:
        print(f"{CONTROLNET_NAME} goes into models/controlnet, for the stock ControlNetLoader.")

    path = folder / QFORMER_NAME
    weights, config = checkpoint.encoder_weights, checkpoint.encoder_config
    with _progress(path.name, data_size(weights, dtype)) as progress:
        save_qformer(path, weights, config, dtype=dtype, overwrite=force, progress=progress)
    print(f"Wrote {path} ({_bytes(path.stat().st_size)}, {arguments.dtype}).")
    if checkpoint.subject is not None:
        shape = list(checkpoint.subject.shape)
        print(f"Note: {checkpoint.path} also holds a tuned subject {shape}, which Load Tuned Subject takes from it.")
    for problem in checkpoint.problems:  # such as a ControlNet that cannot be read, and so was not written
        print(f"Note: {problem}")


def _inspect(arguments: argparse.Namespace) -> None:
    """`inspect`: what it is, a table of its parts, the subject encoder's sizes; of any other tensors, how large."""
    rows = [("part", "file", "tensors", "parameters", "dtype", "size")]
    if arguments.path.is_file() and detect_kind(weights := read_tensors(arguments.path)) not in WHOLE:
        rows.append(("all of it", arguments.path.name, *_measures(weights)))
        print(f"{arguments.path}: {describe(weights)}\n\n{_table(rows)}")
        return

    checkpoint = open_checkpoint(arguments.path)
    rows.append(
        ("subject encoder", _relative(checkpoint.encoder_path, checkpoint.path), *_measures(checkpoint.encoder_weights))
    )
    for name, title in (NETWORKS | {"controlnet": "ControlNet"}).items():
        if part := getattr(checkpoint, name):
            rows.append((title, _relative(part.path, checkpoint.path), *_measures(part.weights)))
    if checkpoint.subject is not None:
        rows.append(("tuned subject", "", *_measures({"subject": checkpoint.subject})))

    print(f"{checkpoint.path}: {checkpoint.format}\n")
    print(_table(rows))
    print("\nsubject encoder")
    for part, sizes in checkpoint.encoder_config.to_dict().items():
        print(f"  {part}: {_sizes(sizes)}")
    for problem in [*checkpoint.problems, *_faults(checkpoint)]:
        print(f"\nNote: {problem}")


def _faults(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence for each network that lacks tensors or holds ones it should not."""
    for name in CONVERSIONS:
        if part := getattr(checkpoint, name):
            try:
                network_to_ldm(name, part.weights, part.config)
            except ValueError as error:
                yield f"{_relative(part.path, checkpoint.path)}: {error}"


def _stable_diffusion(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """The stock loader's checkpoint, and what will keep it from loading; nothing of both if there is only a Q-Former.

    Raises CheckpointError if the source has some of the three networks, or a file that may be one and cannot be read.
    """
    if not checkpoint.problems and not any(getattr(checkpoint, name) for name in NETWORKS):
        return {}, []
    found = {name: checkpoint.require(name) for name in NETWORKS}
    weights = {name: part.weights for name, part in found.items()}
    for name, part in found.items():
        check_depth(name, weights[name], part.config)
    parts = [*weights.values()]
    return stable_diffusion_checkpoint(*parts), departures_from_stock(*parts)


def _controlnet(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The stock loader's ControlNet; empty if the checkpoint has none."""
    if checkpoint.controlnet is None:
        return {}
    return network_to_ldm("controlnet", checkpoint.controlnet.weights, checkpoint.controlnet.config)


def _check_folder(folder: Path, names: list[str], overwrite: bool) -> None:
    """Raises OSError if any of these files may not be written into the folder, which need not exist yet."""
    existing = _nearest_folder(folder)
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file, and a folder is to be written there: choose another name.")
    if folder.is_dir():
        for name in names:
            check_target(folder / name, overwrite=overwrite)


def _nearest_folder(folder: Path) -> Path:
    """The folder itself, or where it is not there yet, the nearest thing above it that is."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, told of bytes as they are written; a line for every tenth where there is no tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _progress_lines(title, total)
    else:
        with tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar:
            yield bar.update


def _progress_lines(title: str, total: int) -> Callable[[int], None]:
    done = tenths = 0

    def update(written: int) -> None:
        nonlocal done, tenths
        done += written
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            print(f"{title}: {_bytes(done)} of {_bytes(total)}", file=sys.stderr)

    return update


def _relative(file: Path, checkpoint: Path) -> str:
    """A part's file as seen from the checkpoint's folder."""
    return file.relative_to(checkpoint).as_posix() if checkpoint in file.parents else file.name


def _measures(weights: Mapping[str, Tensor]) -> tuple[str, str, str, str]:
    """How many tensors and parameters, in which dtypes, and how large."""
    parameters = sum(tensor.numel() for tensor in weights.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    return str(len(weights)), f"{parameters:,}", ", ".join(dtypes), _bytes(data_size(weights))


def _bytes(count: int) -> str:
    """A number of bytes for people: 3.44 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = {"tensors", "parameters", "size"}
    lines = []
    for row in rows:
        cells = zip(rows[0], row, widths, strict=True)
        aligned = [cell.rjust(width) if head in numbers else cell.ljust(width) for head, cell, width in cells]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _sizes(value: object) -> str:
    """A part of a configuration on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)
