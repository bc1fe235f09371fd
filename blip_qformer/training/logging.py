"""The log of a run: a progress bar in the terminal, and TensorBoard through accelerate's tracker."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..atomic import atomic_file
from ..extras import import_extra

log = logging.getLogger("blip_diffusion")

FOLDER = "log"  # in the output folder of the run


class RunLog:
    """Progress bar and trackers of the main process; the other processes write nothing.

    A log that cannot be written, on a full disk for example, stops no run: it ends there, and says so. accelerate's
    trackers would raise.

    Args:
        accelerator: Accelerator with ``log_with="tensorboard"`` and the run's output as its logging folder.
        steps: Steps of the whole run.
        done: Steps that were done before this run was started.
    """

    def __init__(self, accelerator: Accelerator, steps: int, done: int):
        import_extra("tensorboard", "Writing the log of a run")  # accelerate would log nothing, and say nothing
        tqdm = import_extra("tqdm", "Showing progress").tqdm
        self._accelerator, self._output = accelerator, Path(accelerator.logging_dir)
        is_main = accelerator.is_main_process
        self._bar = tqdm(total=steps, initial=done, desc=self._output.name, unit="step", disable=not is_main)
        with self._writing():
            # What a killed run logged behind its last checkpoint is logged again; the purge hides it.
            accelerator.init_trackers(FOLDER, init_kwargs={"tensorboard": {"purge_step": done + 1}})

    def step(self) -> None:
        """Count one update of the weights."""
        self._bar.update()

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of the steps since the last time.

        Args:
            metrics: Numbers by name.
            step: Last of those steps.
        """
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
        with self._writing():
            self._accelerator.log(dict(metrics), step)

    def image(self, image: Image.Image, step: int) -> None:
        """Log samples; the newest also lie beside the log as ``samples.png``.

        Args:
            image: Sheet of samples.
            step: Step that the model is at.
        """
        if not self._accelerator.trackers:
            return
        with self._writing():
            for tracker in self._accelerator.trackers:
                tracker.log_images({"samples": np.asarray(image)[None]}, step, dataformats="NHWC")
            with atomic_file(self._output / "samples.png") as temporary:
                image.save(temporary, format="PNG")  # the temporary name has another suffix

    def close(self) -> None:
        """Write out what is buffered."""
        self._bar.close()
        with self._writing():
            for tracker in self._accelerator.trackers:
                tracker.finish()
        self._accelerator.trackers.clear()  # accelerate would finish them again

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._accelerator.trackers.clear()
            folder = self._output / FOLDER
            log.warning("The log in %s cannot be written (%s): the run goes on without it.", folder, error)
