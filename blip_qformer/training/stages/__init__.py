"""What can be trained: each module is one stage, a model with its loss.

A stage is a ``torch.nn.Module`` whose ``forward`` turns a batch into losses, so that whatever wraps a model (several
GPUs, several machines) wraps the loss with it. See :class:`~.base.Stage`.
"""

from __future__ import annotations

from mini.stages.appearance import AppearanceStage
from mini.stages.autoencoder import AutoencoderStage
from mini.stages.vision import VisionStage

from ..config import RunConfig
from .base import Stage
from .multimodal import MultimodalStage
from .subject import SubjectStage

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (AutoencoderStage, VisionStage, MultimodalStage, AppearanceStage, SubjectStage)
}


def stage_class(name: str) -> type[Stage]:
    """The stage of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in STAGES:
        raise ValueError(f'There is no stage "{name}": choose one of {", ".join(STAGES)}.')
    return STAGES[name]


def make_stage(config: RunConfig) -> Stage:
    """The stage that a run's file names, its model read or made.

    Raises:
        ValueError: there is no such stage, it does not know one of its options, or the model is not there.
    """
    return stage_class(config.stage)(config)


__all__ = ["STAGES", "Stage", "make_stage", "stage_class"]
