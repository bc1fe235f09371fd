"""The training loop of every stage, on ``accelerate``: one process, several GPUs or several machines.

    accelerate launch -m blip_qformer pretrain RUN.yaml

A run that was killed goes on from its last checkpoint, with the same pairs in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from torch import Tensor

from ..atomic import only_writer
from ..data.collate import Batch
from ..data.stream import PairStream
from ..pipeline import save_pipeline
from ..pipeline.new import Initialiser
from .batches import pair_stream, seeded_batches
from .checkpointing import find_latest
from .config import RunConfig
from .logging import RunLog
from .metrics import MetricAverager
from .stages import STAGES, Stage, make_stage
from .train_state import TrainState, ema_weights

WAIT = 30  # seconds: a killed run's workers notice after five that it is gone, and hold its folder until then

StepContext = Callable[[torch.device], AbstractContextManager]


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite."""


def train(
    config: RunConfig,
    stop_at: int | None = None,
    *,
    stages: Mapping[str, type[Stage]] = STAGES,
    initialise: Initialiser | None = None,
    step_context: StepContext = lambda device: nullcontext(),
    allow: Collection[str] = (),
) -> Path:
    """Run a stage to its end, from its last checkpoint if there is one.

    Args:
        config: Settings of the run.
        stop_at: Last step to make, where that is not the run's last one; the learning rate's schedule stays that of the
            whole run.
        stages: Stages by name, of which the run's file names one.
        initialise: Function that changes the random weights of a new model, called once it is made.
        step_context: Context of each forward and backward pass, made for the device that trains.
        allow: What the run's sources of pairs may do besides reading files: ``urls`` and ``commands``, see
            :func:`~blip_qformer.data.shards.find_shards`.

    Returns:
        Folder of the trained model, in the Hub layout.

    Raises:
        NonFiniteError: A loss or a gradient became NaN or infinite; names the step and the pairs.
        ValueError: A setting does not fit, ``stop_at`` is no step, or another run writes into the same folder.
        OSError: The disk is full; the last checkpoint stays whole.
    """
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"The run is to stop at step {stop_at}, but the first one is 1.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(config.output), logging_dir=str(config.output)),
        # Not every batch needs every weight: where subjects are dropped, no encoder.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if not accelerator.is_main_process:
        return _train(config, accelerator, stop_at, stages, initialise, step_context, allow)
    with only_writer(config.output, "pretrain", WAIT):
        return _train(config, accelerator, stop_at, stages, initialise, step_context, allow)


def _train(
    config: RunConfig,
    accelerator: Accelerator,
    stop_at: int | None,
    stages: Mapping[str, type[Stage]],
    initialise: Initialiser | None,
    step_context: StepContext,
    allow: Collection[str],
) -> Path:
    """Run a stage in this process of the run, whose main process holds the output folder; see :func:`train`."""
    set_seed(config.seed, device_specific=True)
    stage = make_stage(config, stages, initialise).to(accelerator.device)
    state = TrainState(config, accelerator, stage)
    checkpoints = config.output / "checkpoints"
    if latest := find_latest(checkpoints, accelerator):
        state.resume(latest)
    last = config.steps if stop_at is None else min(stop_at, config.steps)
    stream = pair_stream(config, accelerator, state.step, allow)
    batches = seeded_batches(config, accelerator, stream, stage.collate_fn, state.step)

    run_log = RunLog(accelerator, config.steps, state.step)
    try:
        fit(state, batches, stream, last, run_log, checkpoints, step_context)
    finally:
        run_log.close()

    target = config.output / "model"
    if accelerator.is_main_process:
        with ema_weights(stage, state.ema):
            stage.finish(batches)
            save_pipeline(stage.pipeline, target, getattr(torch, config.save_dtype))
    accelerator.wait_for_everyone()
    del batches
    state.release()
    accelerator.end_training()
    return target


def fit(
    state: TrainState,
    batches: Iterator[Batch],
    stream: PairStream,
    last: int,
    run_log: RunLog,
    checkpoints: Path,
    step_context: StepContext,
) -> None:
    """Update the weights step by step, with logs, samples and checkpoints when they are due.

    Args:
        state: State of the training, changed in place.
        batches: Batches of this process, from the first step that is not done.
        stream: Pairs that they are made of, which counts what could not be read.
        last: Last step to make.
        run_log: Log of the run.
        checkpoints: Folder of its checkpoints.
        step_context: Context of each forward and backward pass.

    Raises:
        NonFiniteError: A loss or a gradient became NaN or infinite.
        OSError: A checkpoint could not be written.
    """
    config, accelerator, stage = state.config, state.accelerator, state.stage
    model, optimizer = state.model.train(), state.optimizer
    averager = MetricAverager(accelerator, config.batch_size)
    for step in range(state.step + 1, last + 1):
        keys: list[str] = []
        for _ in range(config.gradient_accumulation):
            batch = next(batches)
            keys += batch["keys"]
            with accelerator.accumulate(model), step_context(accelerator.device):
                losses = model(batch)
                check_finite(losses["loss"], step, batch["keys"])
                accelerator.backward(losses["loss"])
            averager.add(losses)
        norm = accelerator.clip_grad_norm_(stage.trainable_parameters(), config.max_grad_norm or math.inf)
        if config.mixed_precision != "fp16":  # there the gradient scaler leaves such a step out by itself
            check_finite(cast(Tensor, norm), step, keys, "gradient")
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            state.scheduler.step()  # not accelerate's, which would step once for each process
        optimizer.zero_grad()
        if state.ema:
            state.ema.step(stage.trainable_parameters())
        state.step = step

        run_log.step()
        if _is_due(step, config.log_every, last):
            metrics = {**averager.reduce(), "learning_rate": state.scheduler.get_last_lr()[0]}
            run_log.metrics(metrics | _unreadable(accelerator, stream), step)
        with averager.paused():
            if accelerator.is_main_process and _is_due(step, config.validate_every, last):
                log_samples(state, run_log)
            if _is_due(step, config.checkpoint_every, last):
                state.save(checkpoints)


def check_finite(value: Tensor, step: int, keys: Sequence[str], what: str = "loss") -> None:
    """Refuse a loss or a gradient that is NaN or infinite.

    Args:
        value: Loss, or norm of the gradient.
        step: Step that is made.
        keys: Keys of the pairs of this process's batch. A gradient is that of all processes: the
            pairs at fault may be another process's, whose log names them.
        what: Name of the value, for the error.

    Raises:
        NonFiniteError: The value is NaN or infinite; the message names the step and the pairs.
    """
    if not math.isfinite(number := float(value.detach())):
        raise NonFiniteError(
            f"The {what} of step {step} is {number}, for the pairs {', '.join(keys)}: look at them, or lower the "
            "learning rate; the run goes on from its last checkpoint."
        )


def log_samples(state: TrainState, run_log: RunLog) -> None:
    """Log samples of the averaged weights, where the stage has any to show."""
    with torch.no_grad(), ema_weights(state.stage, state.ema):
        image = state.stage.samples()
    if image is not None:
        run_log.image(image, state.step)


def _unreadable(accelerator: Accelerator, stream: PairStream) -> dict[str, int]:
    """How often something could not be read since the run was started, in all processes; nothing if that is 0."""
    count = cast(Tensor, accelerator.reduce(torch.tensor(stream.unreadable, device=accelerator.device)))
    return {"unreadable": int(count)} if count else {}


def _is_due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
