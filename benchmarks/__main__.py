"""`make bench`: speed as ratios. ``python -m benchmarks --write`` keeps them in RESULTS.md."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from tests.host import load_host

from .editing import ATTENTION_HEAD, attention_costs, attention_rows, editing_rows
from .encoding import compose_rows, encoder_rows
from .finetune import MEMORY_HEAD, finetune_costs, finetune_rows
from .models import SIZES, encoder_of, hosted, reference_pipeline
from .sampling import sampling_rows
from .subjects import VIEWS_HEAD, trajectory_rows, view_costs
from .table import HEAD, RESULTS, machine, markdown_table, write_section
from .training import SCALING_HEAD, scaling, training_rows

COMMAND = "make bench"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed against named peers, as ratios.")
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS.name}")
    write = parser.parse_args().write

    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        host = load_host(Path(folder) / "host")
        pipeline = reference_pipeline(Path(folder) / "reference")
        loaded = hosted(host, pipeline)
        for group in (
            encoder_rows(encoder_of(pipeline), pipeline),
            compose_rows(host, loaded, pipeline),
            sampling_rows(host, loaded),
            trajectory_rows(host, loaded),
            editing_rows(host, loaded),
            attention_rows(),
            finetune_rows(host, loaded, pipeline.unet),
        ):
            for row in group:
                print(" | ".join(row.cells()), flush=True)
                rows.append(row.cells())
        views = [*view_costs(encoder_of(pipeline))]
        attention = [*attention_costs()]
    for row in training_rows():
        print(" | ".join(row.cells()), flush=True)
        rows.append(row.cells())
    processes = [*scaling()]
    tuning = [*finetune_costs()]

    widths = "-".join(str(width) for width in SIZES.unet_channels)
    text = (
        f"{machine()}. Random weights, float32, both on the same tensors; full size, but the sampled U-Net, which is "
        f"SD1.5's with widths {widths}. Ours and the peer ran in turns; a ratio below 1 means ours is faster.\n\n"
        f"{markdown_table(HEAD, rows)}\n\n"
        f"A batch of views of one subject, 512x512, each batch in a process of its own:\n\n"
        f"{markdown_table(VIEWS_HEAD, views)}\n\n"
        f"One self-attention layer that takes over another picture's, each in a process of its own:\n\n"
        f"{markdown_table(ATTENTION_HEAD, attention)}\n\n"
        f"Fine-tuning on one subject, each way in a process of its own:\n\n"
        f"{markdown_table(MEMORY_HEAD, tuning)}\n\n"
        f"Stage 2 of the small model in several processes on this one machine:\n\n"
        f"{markdown_table(SCALING_HEAD, processes)}"
    )
    print(f"\n{text}")
    if write:
        write_section(COMMAND, text)


if __name__ == "__main__":
    main()
