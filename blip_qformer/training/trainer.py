"""The training loop of every stage, on ``accelerate``: one process, several GPUs or several machines.

    accelerate launch -m blip_qformer pretrain RUN.yaml

A run that was killed goes on from its last checkpoint, with the same pairs in the same order.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from ..data.collate import Batch
from ..data.stream import PairStream
from .checkpointing import find_newest, save_checkpoint
from .config import RunConfig
from .logging import RunLog
from .stages import Stage, make_stage, stage_class
from .train_state import TrainState, averaged


def train(config: RunConfig, stop_at: int | None = None) -> Path:
    """Run a stage to its end, from its last checkpoint if there is one.

    Args:
        stop_at: the last step to take, where that is not the run's last one; its schedule stays that of the whole run.

    Returns:
        The folder of the trained model, in the Hub layout.

    Raises:
        NonFiniteError: the loss became NaN or infinite; names the step and the pairs.
        ValueError: something in the run's file does not fit, or stop_at is no step.
        OSError: the disk is full; the last checkpoint stays whole.
    """
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"The run is to stop at step {stop_at}, but the first one is 1.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        # Not every batch needs every weight: a dropped subject needs no encoder.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(config.seed, device_specific=True)
    stage = make_stage(config)
    stage.to(accelerator.device)
    updates = TrainState(config, accelerator, stage)
    checkpoints = config.output / "checkpoints"
    newest = find_newest(checkpoints, accelerator)
    done = updates.take_up(newest) if newest else 0
    last = config.steps if stop_at is None else min(stop_at, config.steps)
    stream = pair_stream(config, accelerator, done)
    batches = seeded_batches(config, accelerator, stream, done)

    run_log = RunLog(accelerator, config.output / "log", config.steps, done)
    figures = Figures(config, accelerator, stream)
    stage.train()
    try:
        for step in range(done + 1, last + 1):
            for losses in updates.make(step, batches):
                figures.add(losses)
            run_log.step()
            if _due(step, config.log_every, last):
                run_log.figures(figures.take(updates.learning_rate), step)
            with figures.paused():
                if accelerator.is_main_process and _due(step, config.validate_every, last):
                    _draw(stage, updates.average, run_log, step)
                if _due(step, config.checkpoint_every, last):
                    save_checkpoint(accelerator, checkpoints, step, config.data_order)
    finally:
        run_log.close()

    target = config.output / "model"
    if accelerator.is_main_process:
        with averaged(stage, updates.average):
            stage.finish(batches)
            stage.save(target)
    accelerator.wait_for_everyone()
    # Let go of whatever wraps the model while the processes are still connected: later, gloo may wait for ever.
    del updates, batches
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    return target


def pair_stream(config: RunConfig, accelerator: Accelerator, done: int) -> PairStream:
    """This process's pairs, behind those that ``done`` steps have had."""
    return PairStream(
        list(config.pairs),
        seed=config.seed,
        process_index=accelerator.process_index,
        process_count=accelerator.num_processes,
        skip=done * config.gradient_accumulation * config.batch_size,
        batch_size=config.batch_size,
        shuffle_buffer=config.shuffle_buffer,
    )


def seeded_batches(config: RunConfig, accelerator: Accelerator, stream: PairStream, done: int) -> Iterator[Batch]:
    """This process's batches from a step on, each pair with a seed of its own.

    A pair's seed comes from its place in the whole run, whichever process it falls to.
    """
    loader = DataLoader(
        stream,
        batch_size=config.batch_size,
        collate_fn=stage_class(config.stage).collate(config),
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        multiprocessing_context="spawn" if config.num_workers else None,  # torch's threads do not survive a fork
    )
    for number, batch in enumerate(loader, start=done * config.gradient_accumulation):
        first = (number * accelerator.num_processes + accelerator.process_index) * config.batch_size
        batch["seeds"] = pair_seeds(config.seed, range(first, first + len(batch["keys"])))
        yield to_device(batch, accelerator.device)


def pair_seeds(seed: int, places: range) -> list[int]:
    """A seed for each place in a run; neighbours have nothing in common."""
    return [(place * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + 1) % 2**63 for place in places]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors to where the model is."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


class Figures:
    """Losses averaged over the steps since they were last taken and over all processes, the speed, what was lost."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, stream: PairStream):
        self._accelerator = accelerator
        self._stream = stream
        self._batch = config.batch_size * accelerator.num_processes
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as time that training took."""
        begun = time.monotonic()
        yield
        self._since += time.monotonic() - begun

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Losses of one batch."""
        self._count += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def take(self, learning_rate: float) -> dict[str, float]:
        """The averages, and begin anew; all processes take together.

        ``unreadable``, how often something could not be read since the run was started, is there where it is not 0.
        """
        unreadable = self._accelerator.reduce(torch.tensor(self._stream.unreadable, device=self._accelerator.device))
        sums = self._accelerator.reduce(torch.stack([*self._sums.values()]), "mean")
        averages = dict(zip(self._sums, (sums / self._count).tolist(), strict=True))
        speed = self._count * self._batch / (time.monotonic() - self._since)
        self._begin()
        figures = {**averages, "learning_rate": learning_rate, "samples_per_second": speed}
        return {**figures, "unreadable": int(unreadable)} if unreadable else figures


def _draw(stage: Stage, average: EMAModel | None, run_log: RunLog, step: int) -> None:
    """Samples of the averaged weights."""
    with torch.no_grad(), averaged(stage, average):
        picture = stage.samples()
    if picture is not None:
        run_log.picture(picture, step)


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
