"""`make bench`: speed as ratios, one section of RESULTS.md for each group.

``python -m benchmarks`` runs all groups, ``python -m benchmarks training editing`` these; ``--write`` keeps the tables.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.editing import ATTENTION_HEAD, attention_costs, attention_rows, editing_rows
from benchmarks.encoding import compose_rows, encoder_rows
from benchmarks.finetune import MEMORY_HEAD, finetune_costs, finetune_rows
from benchmarks.models import SIZES, encoder_of, hosted, reference_pipeline
from benchmarks.sampling import sampling_rows
from benchmarks.subjects import VIEWS_HEAD, trajectory_rows, view_costs
from benchmarks.table import HEAD, RESULTS, Row, machine, markdown_table, write_section
from benchmarks.training import SCALING_HEAD, scaling, training_rows
from tests import oracle
from tests.host import Host, load_host

FULL_SIZE = f"full size, but the sampled U-Net, which is SD1.5's with widths {'-'.join(map(str, SIZES.unet_channels))}"


def subjects() -> Iterator[str]:
    """Subject Encode, Subject Prompt Compose and sampling with a subject."""
    yield method(FULL_SIZE)
    with models() as (host, pipeline, loaded):
        yield compared(
            chain(
                encoder_rows(encoder_of(pipeline), pipeline),
                compose_rows(host, loaded, pipeline),
                sampling_rows(host, loaded),
                trajectory_rows(host, loaded),
            )
        )
        yield "A batch of views of one subject, 512x512, each batch in a process of its own:"
        yield markdown_table(VIEWS_HEAD, view_costs(encoder_of(pipeline)))


def editing() -> Iterator[str]:
    """Edits by attention."""
    yield method(FULL_SIZE)
    with models() as (host, _, loaded):
        yield compared(chain(editing_rows(host, loaded), attention_rows()))
    yield "One self-attention layer that takes over another picture's, each in a process of its own:"
    yield markdown_table(ATTENTION_HEAD, attention_costs())


def finetune() -> Iterator[str]:
    """Fine-tuning on one subject."""
    yield method(FULL_SIZE)
    with models() as (host, pipeline, loaded):
        yield compared(finetune_rows(host, loaded, pipeline.unet))
    yield "The same steps, each way in a process of its own:"
    yield markdown_table(MEMORY_HEAD, finetune_costs())


def training() -> Iterator[str]:
    """Stage 2 of the small model."""
    yield method("the small model's sizes")
    yield compared(training_rows())
    yield "The same in several processes on this one machine:"
    yield markdown_table(SCALING_HEAD, scaling())


GROUPS: dict[str, Callable[[], Iterator[str]]] = {
    group.__name__: group for group in (subjects, editing, finetune, training)
}


@contextmanager
def models() -> Iterator[tuple[Host, oracle.BlipDiffusionPipeline, SimpleNamespace]]:
    """Load the host, the reference's pipeline and the same weights in the host; the block runs in inference mode."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        host = load_host(Path(folder) / "host")
        with torch.inference_mode(False):  # one of the groups trains it
            pipeline = reference_pipeline(Path(folder) / "reference")
        yield host, pipeline, hosted(host, pipeline)


def method(sizes: str) -> str:
    """Describe what a group's ratios mean, and where they were measured."""
    return (
        f"{machine()}. Random weights, float32, both on the same tensors; {sizes}. Ours and the peer ran in turns; "
        "a ratio below 1 means ours is faster."
    )


def compared(rows: Iterable[Row]) -> str:
    """Format comparisons as a table, and print each once it is measured."""
    cells = []
    for row in rows:
        cells.append(row.cells())
        print(" | ".join(cells[-1]), flush=True)
    return markdown_table(HEAD, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the groups that the command line names, and print or keep their sections."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed against named peers, as ratios.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)} (all)")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {RESULTS.name}")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.groups if name not in GROUPS]:
        parser.error(f'"{unknown[0]}" is no group: choose from {", ".join(GROUPS)}')
    for name in chosen.groups or GROUPS:
        text = "\n\n".join(GROUPS[name]())
        print(f"\n{text}\n", flush=True)
        if chosen.write:
            write_section(f"python -m benchmarks {name}", text)


if __name__ == "__main__":
    main()
