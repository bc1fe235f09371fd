"""The stages of the small model: the paper's two, and those that only a model trained from nothing needs."""

from __future__ import annotations

from collections.abc import Mapping

from blip_qformer.training.stages import STAGES as PAPER_STAGES
from blip_qformer.training.stages import Stage

from .appearance import AppearanceStage
from .autoencoder import AutoencoderStage
from .vision import VisionStage

#: Stages by their names in a run's file, for :func:`blip_qformer.training.trainer.train`.
STAGES: Mapping[str, type[Stage]] = {
    **PAPER_STAGES,
    **{stage.name: stage for stage in (AutoencoderStage, VisionStage, AppearanceStage)},
}

__all__ = ["STAGES", "AppearanceStage", "AutoencoderStage", "VisionStage"]
