"""The paper's training stages by name, and how a run's stage is made.

A new stage is a subclass of :class:`~.base.Stage`. It does not have to stand here: :func:`~..trainer.train` takes a
mapping of stages, to which other packages add their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...pipeline import Pipeline, load_pipeline, new_pipeline, replace_network
from ...pipeline.new import Initialiser
from ..config import RunConfig
from ..options import OptionGroup, read_settings
from .base import Stage
from .multimodal import MultimodalStage
from .subject import SubjectStage

#: Stages of the paper by their names in a run's file.
STAGES: Mapping[str, type[Stage]] = {stage.name: stage for stage in (MultimodalStage, SubjectStage)}


def find_stage(name: str, stages: Mapping[str, type[Stage]] = STAGES) -> type[Stage]:
    """Look a stage up by its name.

    Args:
        name: Name in a run's file.
        stages: Stages that there are.

    Returns:
        The stage's class.

    Raises:
        ValueError: There is no stage of that name.
    """
    if name not in stages:
        raise ValueError(f'There is no stage "{name}": choose one of {", ".join(stages)}.')
    return stages[name]


def read_options(stage: type[Stage], config: RunConfig) -> OptionGroup:
    """Check the options of a run.

    Args:
        stage: Class of its stage.
        config: Settings of the run.

    Returns:
        Options for the stage's constructor.

    Raises:
        ValueError: The stage does not have one of them, or it is of the wrong kind.
    """
    return read_settings(stage.Options, config.options, "The run", owner=f"the stage {stage.name}", prefix="options.")


def make_pipeline(config: RunConfig, initialise: Initialiser | None = None) -> Pipeline:
    """Read or make the model that a run starts from.

    A folder is loaded, a mapping of sizes makes a new model. Networks that the settings name are then replaced, the
    widths of all networks are checked against each other, and gradient checkpointing of the U-Net is switched on if the
    settings ask for it.

    Args:
        config: Settings of the run.
        initialise: Function that changes the random weights of a new model; a loaded model stays as it is.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: The model is not there, is damaged, or its networks do not fit each other.
    """
    model = config.model
    pipeline = new_pipeline(model, config.seed, initialise) if isinstance(model, dict) else load_pipeline(Path(model))
    for name, folder in config.networks.items():
        replace_network(pipeline, name, Path(folder))
    pipeline.check_widths()
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return pipeline


def make_stage(
    config: RunConfig,
    stages: Mapping[str, type[Stage]] = STAGES,
    initialise: Initialiser | None = None,
) -> Stage:
    """Make the stage that a run's file names, with its model.

    Args:
        config: Settings of the run.
        stages: Stages that there are.
        initialise: Function that changes the random weights of a new model.

    Returns:
        The stage, on the CPU.

    Raises:
        ValueError: There is no such stage, it does not have one of its options, or the model is not there.
    """
    stage = find_stage(config.stage, stages)
    options = read_options(stage, config)
    return stage(make_pipeline(config, initialise), options, config.output)


__all__ = ["STAGES", "Stage", "find_stage", "make_pipeline", "make_stage", "read_options"]
