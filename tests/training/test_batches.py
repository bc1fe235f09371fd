"""Batches: the same pairs with the same seeds, from any step and in any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from blip_qformer.data.collate import Batch
from blip_qformer.training.batches import pair_seeds, pair_stream, seeded_batches
from blip_qformer.training.config import RunConfig
from tests import tiny


def batches_from(config: RunConfig, accelerator: Accelerator, done: int) -> Iterator[Batch]:
    collate_fn = tiny.make_stage(config.stage).collate_fn
    return seeded_batches(config, accelerator, pair_stream(config, accelerator, done), collate_fn, done)


def test_batches_go_on_where_they_were(pairs):
    """The same pairs with the same seeds, each of its own; in another epoch, too."""
    done = 5
    config = tiny.make_config("vision", pairs=pairs, gradient_accumulation=2)
    accelerator = Accelerator(cpu=True)
    whole = list(itertools.islice(batches_from(config, accelerator, 0), 2 * done + 3))
    rest = list(itertools.islice(batches_from(config, accelerator, done), 3))
    for found, expected in zip(rest, whole[2 * done :], strict=True):
        assert found["keys"] == expected["keys"]
        assert found["seeds"] == expected["seeds"]
        assert torch.equal(found["targets"], expected["targets"])
    seeds = [seed for batch in whole for seed in batch["seeds"]]
    assert seeds == pair_seeds(0, range(len(seeds)))
    assert len(set(seeds)) == len(seeds)


def test_seeds_belong_to_positions_and_not_to_processes(pairs):
    """Two processes with half the batch have the seeds of one."""

    class Two:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, index: int):
            self.process_index = index

    config = tiny.make_config("vision", pairs=pairs, batch_size=2)
    shared = [next(itertools.islice(batches_from(config, Two(index), 3), 1, None)) for index in range(2)]
    whole = pair_seeds(0, range(4 * 4, 5 * 4))
    assert [seed for batch in shared for seed in batch["seeds"]] == whole
    assert len(set(pair_seeds(0, range(10_000)) + pair_seeds(1, range(10_000)))) == 20_000
