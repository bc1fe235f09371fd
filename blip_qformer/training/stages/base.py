"""What every stage has in common."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from PIL import Image
from torch import Tensor, nn

from ...data.collate import Batch, to_pixels
from ...data.pairs import Pair
from ...pipeline.pipeline import Pipeline, load_pipeline, new_pipeline, replace_network, save_pipeline
from ..config import RunConfig, checked

__all__ = ["Batch", "Stage", "generators", "normal", "side_by_side", "to_picture", "to_pixels"]


class Stage(nn.Module, ABC):
    """A model with its loss.

    A batch holds what :meth:`collate` made of some pairs, and ``seeds``, a number for each of them: everything random
    about a pair is drawn from its own seed, so that a run is the same however many processes share it, and the same
    after it was resumed. A loss is averaged so that the mean of all processes' losses is that of one process with all
    their pairs.

    Args:
        config: the run; its ``options`` are the arguments of ``_set``.
    """

    name: ClassVar[str]

    #: The networks of the model that this stage needs: ``encoder``, ``text_encoder``, ``unet``, ``vae``.
    uses: ClassVar[tuple[str, ...]]

    #: What of them trains, such as ``unet`` or ``encoder.qformer``; the rest is frozen.
    trains: ClassVar[tuple[str, ...]]

    def __init__(self, config: RunConfig):
        super().__init__()
        model = config.model
        self.pipeline: Pipeline = (
            new_pipeline(model, config.seed) if isinstance(model, dict) else load_pipeline(Path(model))
        )
        for name, folder in config.networks.items():
            replace_network(self.pipeline, name, Path(folder))
        self.pipeline.check_widths()
        self.networks = nn.ModuleDict({name: self.pipeline.networks[name] for name in self.uses})
        self.networks.requires_grad_(False)
        for name in self.trains:
            self.networks.get_submodule(name).requires_grad_(True)
        self.save_dtype = getattr(torch, config.save_dtype)
        self._set(**self.options(config))

    @abstractmethod
    def _set(self) -> None:
        """Take the stage's options, which are the arguments, and make what it adds to the model."""

    @classmethod
    def options(cls, config: RunConfig) -> dict[str, Any]:
        """All options of this stage: the run's, and for the rest their defaults.

        Raises:
            ValueError: the run sets one that the stage does not have, or to something of the wrong kind.
        """
        parameters = inspect.signature(cls._set).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
        if unknown := sorted(map(str, config.options.keys() - defaults.keys())):
            raise ValueError(
                f"The run sets the options {', '.join(unknown)}, which the stage {cls.name} does not have: choose from "
                f"{', '.join(defaults)}."
            )
        kinds = get_type_hints(cls._set)
        given = {
            name: checked(name, value, kinds[name], "The run, among its options,")
            for name, value in config.options.items()
        }
        return defaults | given

    @classmethod
    @abstractmethod
    def collate(cls, config: RunConfig) -> Callable[[Sequence[Pair]], Batch]:
        """A function of :mod:`..batches` that makes a batch of pairs; it runs in the workers."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch, each averaged over it; ``loss`` is the one that is minimised."""

    def samples(self) -> Image.Image | None:
        """A picture that shows how far training has come, or None where there is nothing to see."""
        return None

    def finish(self, batches: Iterator[Batch]) -> None:
        """Whatever is measured on the trained weights before they are saved; ``batches``: those after the last step."""

    def save(self, folder: Path) -> Path:
        """Write the whole model in the Hub layout."""
        return save_pipeline(self.pipeline, folder, self.save_dtype)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train, in an order that does not change."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One source of chance for each pair of a batch, on the CPU so that it is the same on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(sources: Iterable[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Normal noise [B, *shape], each row from its own source."""
    return torch.stack([torch.randn(*shape, generator=source) for source in sources]).to(device, non_blocking=True)


def to_picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 -> a picture."""
    levels = (pixels.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def side_by_side(rows: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Pictures [3, H, W] of one size as one sheet, a row below the other."""
    return to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1))
