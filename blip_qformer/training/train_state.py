"""What a checkpoint of a run holds: the stage, the optimizer with its schedule, the moving average, and the step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .checkpointing import load_checkpoint, save_checkpoint
from .config import RunConfig
from .stages import Stage

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}  # diffusers' plain constant has no warm-up


class TrainState:
    """Everything that a checkpoint holds.

    The settings are those of the run's file, also after it was resumed: a checkpoint brings back AdamW's moments, but
    not the learning rate that they were made with.

    Args:
        config: Settings of the run.
        accelerator: Accelerator of this process, which wraps the stage and the optimizer.
        stage: Stage on the accelerator's device.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, stage: Stage):
        self.config, self.accelerator, self.stage = config, accelerator, stage
        self.step = 0
        optimizer = make_optimizer(config, stage)
        self.scheduler = make_scheduler(config, optimizer)
        self.model, self.optimizer = accelerator.prepare(stage, optimizer)
        self.ema = make_ema(stage, config.ema_decay)
        accelerator.register_for_checkpointing(self)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint, in all processes together.

        Args:
            folder: Folder of the run's checkpoints.

        Returns:
            The checkpoint's own folder.

        Raises:
            OSError: The disk is full, or the folder cannot be written to; the checkpoint before it stays.
        """
        return save_checkpoint(self.accelerator, folder, self.step, self.config.data_order)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Args:
            checkpoint: The checkpoint's own folder.

        Raises:
            ValueError: The checkpoint does not fit this run.
        """
        self.step = load_checkpoint(self.accelerator, checkpoint, self.config.data_order)

    def release(self) -> None:
        """Let go of whatever wraps the stage while the processes are still connected: later, gloo may wait for ever."""
        self.model = self.stage
        self.accelerator.free_memory()
        gc.collect()

    def state_dict(self) -> dict[str, Any]:
        """What accelerate does not save by itself."""
        return {"updates": self.scheduler.last_epoch, "ema": self.ema.state_dict() if self.ema else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the schedule and the moving average, after accelerate has loaded the rest.

        Args:
            state: Dictionary of :meth:`state_dict`.

        Raises:
            ValueError: One of the two runs keeps a moving average and the other does not.
        """
        for group in self.optimizer.param_groups:
            group.update(adamw_settings(self.config), initial_lr=self.config.learning_rate)
        self.scheduler = make_scheduler(self.config, self.scheduler.optimizer, state["updates"])
        if (self.ema is None) != (state["ema"] is None):
            raise ValueError("an ema_decay of 0 and another one do not go together")
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.decay = self.config.ema_decay
            self.ema.to(self.accelerator.device)  # it was read onto the CPU


def adamw_settings(config: RunConfig) -> dict[str, Any]:
    """Settings of a run under the names that torch's AdamW gives them."""
    return {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }


def make_optimizer(config: RunConfig, stage: Stage) -> torch.optim.AdamW:
    """AdamW on what trains; its fused kernel in place of ten saves a tenth of a step on a CPU."""
    return torch.optim.AdamW(stage.trainable_parameters(), **adamw_settings(config), fused=True)


def make_scheduler(config: RunConfig, optimizer: Optimizer, updates: int = 0) -> LambdaLR:
    """Make the schedule of the learning rate, as it is after a number of updates.

    Args:
        config: Settings of the run.
        optimizer: Optimizer whose learning rate is set.
        updates: Updates that were made.

    Returns:
        diffusers' scheduler.
    """
    return get_scheduler(
        SCHEDULES[config.schedule],
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
        last_epoch=updates - 1,
    )


def make_ema(stage: Stage, decay: float) -> EMAModel | None:
    """Make the moving average of what trains, which forgets faster early on; None where there is to be none."""
    if not decay:
        return None
    return EMAModel(
        stage.trainable_parameters(), decay=decay, use_ema_warmup=True, inv_gamma=10.0, power=0.75, foreach=True
    )


@contextmanager
def ema_weights(stage: Stage, ema: EMAModel | None) -> Iterator[None]:
    """Put the averaged weights in, which are what is saved in the end, and the stage into evaluation mode.

    Args:
        stage: Stage, which has its own weights back afterwards.
        ema: Moving average of them; None leaves them in.
    """
    stage.eval()
    if ema:
        ema.store(stage.trainable_parameters())
        ema.copy_to(stage.trainable_parameters())
    try:
        yield
    finally:
        if ema:
            ema.restore(stage.trainable_parameters())
        stage.train()
