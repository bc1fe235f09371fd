"""Where a run's figures go: a line in the terminal, and TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..extras import import_extra

log = logging.getLogger("blip_diffusion")


class RunLog:
    """Writes in the main process and is silent in the others.

    A log that cannot be written, on a full disk for example, stops no run: it ends there, and says so.

    Args:
        folder: for TensorBoard; the folder it lies in gives the progress line its name.
        steps: of the whole run; ``done``: how many of them lie behind it.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int, done: int):
        import_extra("tensorboard", "Writing the log of a run")  # torch's module would be blamed for its absence
        tensorboard = import_extra("torch.utils.tensorboard", "Writing the log of a run")
        tqdm = import_extra("tqdm", "Showing progress").tqdm
        is_main = accelerator.is_main_process
        self._bar = tqdm(total=steps, initial=done, desc=folder.parent.name, unit="step", disable=not is_main)
        self._folder = folder
        self._writer = None
        if is_main:
            with self._writing():
                # What a killed run logged behind its last checkpoint is done again, and hidden.
                self._writer = tensorboard.SummaryWriter(str(folder), purge_step=done + 1)

    def step(self) -> None:
        """One update of the weights is done."""
        self._bar.update()

    def figures(self, figures: dict[str, float], step: int) -> None:
        """Figures of the steps since the last time."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
        if self._writer:
            with self._writing():
                for name, value in figures.items():
                    self._writer.add_scalar(name, value, step)

    def picture(self, picture: Image.Image, step: int) -> None:
        """What the model draws at this step; the newest also lies beside the log as ``samples.png``."""
        if self._writer:
            with self._writing():
                self._writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
                picture.save(self._folder.with_name("samples.png"))

    def close(self) -> None:
        """Write out what is buffered."""
        self._bar.close()
        if self._writer:
            with self._writing():
                self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            log.warning("The log in %s cannot be written (%s): the run goes on without it.", self._folder, error)
