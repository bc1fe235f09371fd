"""The command ``blip-qformer finetune MODEL PICTURE... --word WORD --output FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..atomic import make_folder
from ..extras import import_extra
from ..finetune.loop import FULL, LOW_RANK, FinetuneSettings, check_count
from ..finetune.lora import RANK
from ..subject.file_name import checked_name
from .output import format_bytes

UNFINISHED = ".unfinished-finetuning"  # folder in the output: what a run that was ended needs to go on

EXTRAS = ("accelerate", "diffusers", "transformers")


def add_finetune_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``finetune`` to a parser's commands."""
    defaults = FinetuneSettings()
    parser = commands.add_parser(
        "finetune",
        help="teach a model one subject from a few pictures",
        description="Fine-tune a model on 3 to 5 pictures of one thing. Writes the tuned subject, an embedding that "
        "every ComfyUI loads, and beside it a LoRA file or, with --trains full, a checkpoint for the stock loader; "
        "and pictures of the curve and of what was drawn on the way. A run that was ended goes on when the same "
        "command is given again.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a whole BLIP-Diffusion model in the Hub layout")
    parser.add_argument("images", metavar="PICTURE", nargs="+", type=Path, help="3 to 5 pictures of the thing")
    parser.add_argument("--word", required=True, help="what it is: dog, teddy bear, teapot")
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="what is made goes there")
    parser.add_argument("--name", help="of the files, letters, digits, - and _ (the word)")
    parser.add_argument("--trains", choices=[LOW_RANK, FULL], default=LOW_RANK, help=f"what of the U-Net ({LOW_RANK})")
    parser.add_argument("--steps", type=int, default=defaults.steps, help=f"({defaults.steps})")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="(5e-6, the paper's)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help=f"({defaults.batch_size})")
    parser.add_argument("--resolution", type=int, default=512, help="edge of the square it learns at, pixels (512)")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of low-rank ({RANK})")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument(
        "--validate-every", metavar="N", type=int, default=20, help="steps between two validations; 0: none (20)"
    )
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], help="(bf16 on a GPU that knows it)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--mirror", action="store_true", help="learn from mirrored pictures too")
    parser.set_defaults(command=finetune)


def finetune(arguments: argparse.Namespace) -> None:
    """Train, write the files, and print which step was kept.

    Args:
        arguments: The parsed arguments of ``finetune``.

    Raises:
        ValueError: A package is missing, or the model, the images or an option cannot be used.
        OSError: A file cannot be written.
    """
    for extra in EXTRAS:
        import_extra(extra, "Fine-tuning")
    from accelerate import Accelerator

    from ..pipeline import load_pipeline
    from ..pipeline.subject_finetune import FinetuneRun, read_image

    word = arguments.word.strip()
    name = checked_name(arguments.name or word.replace(" ", "-"))
    check_count(len(arguments.images))
    images = [read_image(path) for path in arguments.images]
    make_folder(arguments.output)  # before what takes long
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    run = FinetuneRun(
        load_pipeline(arguments.model),
        Accelerator(mixed_precision=arguments.mixed_precision or ("bf16" if has_bf16 else "no")),
        images,
        word,
        FinetuneSettings(arguments.steps, arguments.learning_rate, arguments.batch_size, seed=arguments.seed),
        rank=None if arguments.trains == FULL else arguments.rank,
        resolution=arguments.resolution,
        gradient_checkpointing=arguments.gradient_checkpointing,
        mirror=arguments.mirror,
    )
    result = run.tune(arguments.validate_every, snapshots=arguments.output / UNFINISHED)
    for path in run.save(arguments.output, name, result):
        print(f"Wrote {path} ({format_bytes(path.stat().st_size)}).")
    print(f"{len(result.losses)} steps, step {result.kept_step} kept.")
    for score in result.scores:
        print(f"step {score.step}: likeness {score.likeness:.3f}, agreement {score.agreement:.3f}")
