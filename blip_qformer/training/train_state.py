"""One update of the weights after another: the optimizer, its schedule, and the moving average of what trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from mini.stages.cpu_attention import fast_attention

from ..data.collate import Batch
from .checkpointing import load_checkpoint
from .config import RunConfig
from .stages import Stage

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}  # diffusers' plain constant has no warm-up


class NonFiniteError(ValueError):
    """The loss is no longer a number."""


class TrainState:
    """Everything that a checkpoint holds.

    Args:
        config: the run.
        accelerator: of this process; it wraps the stage.
        stage: on the accelerator's device.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, stage: Stage):
        self._config, self._accelerator, self._stage = config, accelerator, stage
        self.average = make_average(stage, config.ema_decay)
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
        self._model, self._optimizer, self._scheduler = accelerator.prepare(stage, optimizer, scheduler)
        if self.average:
            accelerator.register_for_checkpointing(self.average)

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._scheduler.get_last_lr()[0]

    def take_up(self, checkpoint: Path) -> int:
        """Go on from a checkpoint, with the settings that the run has now; returns how many steps were done.

        Raises:
            ValueError: it does not fit this run.
        """
        done = load_checkpoint(self._accelerator, checkpoint, self._config.data_order)
        self._follow_settings()
        return done

    def make(self, step: int, batches: Iterator[Batch]) -> list[dict[str, Tensor]]:
        """Update the weights once; returns the losses of each batch that it took.

        Raises:
            NonFiniteError: the loss or the gradient became NaN or infinite; names the step and the pairs.
        """
        config, accelerator = self._config, self._accelerator
        seen: list[str] = []
        losses: list[dict[str, Tensor]] = []
        for _ in range(config.gradient_accumulation):
            batch = next(batches)
            seen += batch["keys"]
            with accelerator.accumulate(self._model), fast_attention(accelerator.device):
                losses.append(self._model(batch))
                check_is_number(losses[-1]["loss"], step, batch["keys"])
                accelerator.backward(losses[-1]["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self._stage.trained(), config.max_grad_norm or math.inf)
                    if config.mixed_precision != "fp16":  # there the scaler leaves such a step out by itself
                        check_is_number(norm, step, seen, "gradient")
                self._optimizer.step()
                self._scheduler.step()
                self._optimizer.zero_grad()
        if self.average:
            self.average.step(self._stage.trained())
        return losses

    def _follow_settings(self) -> None:
        """A checkpoint brings back the settings that it was written with; the run's file may have others since."""
        config, schedule = self._config, self._scheduler.scheduler
        schedule.base_lrs = [config.learning_rate for _ in schedule.base_lrs]
        rates = [config.learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = rates
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group.update(
                lr=rate,
                initial_lr=config.learning_rate,
                betas=config.betas,
                eps=config.epsilon,
                weight_decay=config.weight_decay,
            )
        if self.average:
            self.average.decay = config.ema_decay
            self.average.to(self._accelerator.device)  # it was read onto the CPU


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


def check_is_number(figure: Tensor, step: int, keys: Sequence[str], what: str = "loss") -> None:
    """Raises :class:`NonFiniteError` where a loss or a gradient is NaN or infinite, naming the step and the pairs."""
    if not math.isfinite(value := float(figure.detach())):
        # A gradient is that of all processes and may come from the pairs of another one, whose log names its own.
        raise NonFiniteError(
            f"The {what} of step {step} is {value}, for the pairs {', '.join(keys)}: look at them, or lower the "
            "learning rate; the run goes on from its last checkpoint."
        )
