"""The training loop of every stage, on ``accelerate``: one process, several GPUs or several machines.

    accelerate launch -m blip_qformer pretrain RUN.yaml

A run that was killed goes on from its last checkpoint, with the same pairs in the same order.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from .batches import Batch
from .checkpoints import latest_checkpoint, load_checkpoint, remove_unfinished, save_checkpoint
from .config import RunConfig
from .cpu_attention import fast_attention
from .progress import RunLog
from .shards import PairStream
from .stages import Stage, make_stage, stage_class

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}  # diffusers' plain constant has no warm-up


class NotANumberError(ValueError):
    """The loss is no longer a number."""


def train(config: RunConfig) -> Path:
    """Run a stage to its end, from its last checkpoint if there is one.

    Returns:
        The folder of the trained model, in the Hub layout.
    Raises:
        NotANumberError: the loss became NaN or infinite; names the step and the pairs.
        ValueError: something in the run's file does not fit.
        OSError: the disk is full; the last checkpoint stays whole.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        # Not every batch needs every weight: a dropped subject needs no encoder.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(config.seed, device_specific=True)
    stage = make_stage(config)
    stage.to(accelerator.device)
    average = make_average(stage, config.average_decay)
    optimizer = torch.optim.AdamW(
        stage.trained(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,  # one kernel instead of ten, which on a CPU is a tenth of a step
    )
    # accelerate steps a scheduler once for each process, so that it is told of so many more steps.
    processes = accelerator.num_processes
    scheduler = get_scheduler(
        SCHEDULES[config.schedule],
        optimizer,
        num_warmup_steps=config.warmup_steps * processes,
        num_training_steps=config.steps * processes,
    )
    model, optimizer, scheduler = accelerator.prepare(stage, optimizer, scheduler)
    if average:
        accelerator.register_for_checkpointing(average)

    checkpoints = config.output / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_unfinished(checkpoints)
    newest = latest_checkpoint(checkpoints)
    done = load_checkpoint(accelerator, newest, config.data_order) if newest else 0
    if average:
        average.to(accelerator.device)
    run_log = RunLog(accelerator, config.output / "log", config.steps, done)
    stream = pair_stream(config, accelerator, done)
    batches = seeded_batches(config, accelerator, stream, done)
    figures = Figures(config, accelerator, stream)

    stage.train()
    try:
        for step in range(done + 1, config.steps + 1):
            for _ in range(config.gradient_accumulation):
                batch = next(batches)
                with accelerator.accumulate(model), fast_attention(accelerator.device):
                    losses = model(batch)
                    check_is_number(losses["loss"], step, batch)
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(stage.trained(), config.largest_gradient or math.inf)
                        if config.mixed_precision != "fp16":  # there the scaler leaves such a step out by itself
                            check_is_number(norm, step, batch, "gradient")
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                figures.add(losses)
            if average:
                average.step(stage.trained())
            run_log.step()
            if _due(step, config.log_every, config.steps):
                run_log.figures(figures.take(scheduler.get_last_lr()[0]), step)
            if accelerator.is_main_process and _due(step, config.samples_every, config.steps):
                _draw(stage, average, run_log, step)
            if _due(step, config.checkpoint_every, config.steps):
                save_checkpoint(accelerator, checkpoints, step, config.data_order)
    finally:
        run_log.close()

    target = config.output / "model"
    if accelerator.is_main_process:
        with averaged(stage, average):
            stage.finish(batches)
            stage.save(target)
    accelerator.wait_for_everyone()
    # Let go of whatever wraps the model while the processes are still connected: later, gloo may wait for ever.
    del model, batches
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
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        multiprocessing_context="spawn" if config.workers else None,  # torch's threads do not survive a fork
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


def make_average(stage: Stage, decay: float) -> EMAModel | None:
    """The moving average of what trains, or None where there is to be none; early on it forgets faster."""
    if not decay:
        return None
    return EMAModel(stage.trained(), decay=decay, use_ema_warmup=True, inv_gamma=10.0, power=0.75, foreach=True)


@contextmanager
def averaged(stage: Stage, average: EMAModel | None) -> Iterator[None]:
    """Inside, the stage is in evaluation mode with its averaged weights, which are what is saved in the end."""
    stage.eval()
    if average:
        average.store(stage.trained())
        average.copy_to(stage.trained())
    try:
        yield
    finally:
        if average:
            average.restore(stage.trained())
        stage.train()


def check_is_number(figure: torch.Tensor, step: int, batch: Batch, what: str = "loss") -> None:
    """Raises :class:`NotANumberError` where a loss or a gradient is NaN or infinite, naming the step and the pairs."""
    if not math.isfinite(value := float(figure.detach())):
        pairs = ", ".join(batch["keys"])
        raise NotANumberError(
            f"The {what} of step {step} is {value}, for the pairs {pairs}: look at them, or lower the learning rate; "
            "the run goes on from its last checkpoint."
        )


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
