"""The settings of a run, read from one YAML file: which stage trains, on which pairs, from which model, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

from .options import Count, Flag, Fraction, Name, Number, OptionGroup, PositiveCount, needs, read_settings
from .run_file import read_yaml


def _path_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _one_as_many(value: Any) -> Any:
    """One source of pairs needs no list."""
    return [value] if isinstance(value, str | Path) else value


def _false_as_no(value: Any) -> Any:
    """YAML reads ``no`` as false."""
    return "no" if value is False else value


Folder = Annotated[str, Strict(), BeforeValidator(_path_as_text)]
FolderOrSizes = Annotated[Folder | dict[str, Any], needs("a folder, or a mapping of sizes,")]
Sources = Annotated[
    tuple[Folder, ...],
    BeforeValidator(_one_as_many),
    Field(min_length=1),
    needs("a folder, a pattern of shards, or a list of them,"),
]
Betas = Annotated[tuple[Number, Number], needs("a list of two numbers")]
Schedule = Annotated[Literal["constant", "cosine"], needs("one of constant, cosine")]
MixedPrecision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_false_as_no), needs("one of no, fp16, bf16")]
SaveDtype = Annotated[Literal["float32", "float16", "bfloat16"], needs("one of float32, float16, bfloat16")]


class RunConfig(OptionGroup):
    """Everything that decides what a run does.

    Args:
        stage: Name of the stage that trains, see :mod:`.stages`.
        model: Folder in the Hub layout that the run starts from; or the sizes of a new model, as a mapping or as the
            name of a YAML file beside the run's.
        networks: Folders of those networks (``encoder``, ``text_encoder``, ``unet``, ``vae``) that do not come from
            ``model``: the U-Net, text encoder and VAE of Stable Diffusion for a new Q-Former, for example.
        pairs: Folders, shards or patterns of training pairs, see :class:`~blip_qformer.data.stream.PairStream`.
        output: Folder for checkpoints, logs and the trained model; several machines need one that they share.
        seed: Seed of new weights, of the pairs' order, and of all noise.
        steps: Number of updates of the weights.
        batch_size: Pairs that a process reads at once; one update sees this times the number of processes times
            ``gradient_accumulation``.
        gradient_accumulation: Batches of a process that make one update.
        learning_rate: Learning rate of AdamW.
        warmup_steps: Updates over which the learning rate rises from 0.
        schedule: Course of the learning rate after the warm-up: ``constant``, or ``cosine`` down to 0 at the last step.
        weight_decay: Weight decay of AdamW.
        betas: Decay rates of AdamW's two moments.
        epsilon: Number that AdamW adds to its denominator.
        max_grad_norm: Norm that gradients are clipped to; 0 does not clip.
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        gradient_checkpointing: Whether the U-Net's activations are computed again instead of kept.
        ema_decay: Decay of the moving average of the weights, which is what is saved; 0 saves the weights.
        save_dtype: Precision of the trained model's files.
        num_workers: Processes that read pairs, for each training process.
        shuffle_buffer: Pairs that each of them mixes, see :class:`~blip_qformer.data.stream.PairStream`.
        checkpoint_every: Steps between two checkpoints; 0 for none.
        validate_every: Number of steps between two image sheets of samples in the log; 0 for none. Nothing is scored.
        log_every: Steps between two lines of the log; 0 for none.
        options: Options of the stage, see its class ``Options``.
    """

    stage: Name
    model: FolderOrSizes
    pairs: Sources
    output: Annotated[Path, needs("a folder")]
    steps: PositiveCount
    batch_size: PositiveCount
    learning_rate: Number
    seed: Count = 0
    gradient_accumulation: PositiveCount = 1
    warmup_steps: Count = 0
    schedule: Schedule = "constant"
    weight_decay: Number = 0.01
    betas: Betas = (0.9, 0.999)
    epsilon: Number = 1e-8
    max_grad_norm: Number = 1.0
    mixed_precision: MixedPrecision = "no"
    gradient_checkpointing: Flag = False
    ema_decay: Fraction = 0.0
    save_dtype: SaveDtype = "float32"
    num_workers: Count = 1
    shuffle_buffer: Count = 1000
    networks: Annotated[dict[str, Folder], needs("a mapping of names to folders")] = Field(default_factory=dict)
    checkpoint_every: Count = 1000
    validate_every: Count = 0
    log_every: Count = 20
    options: Annotated[dict[str, Any], needs("a mapping")] = Field(default_factory=dict)

    @property
    def data_order(self) -> dict[str, Any]:
        """The settings that decide which pair comes when, as JSON has them."""
        names = ("seed", "batch_size", "gradient_accumulation", "num_workers", "shuffle_buffer")
        return {**{name: getattr(self, name) for name in names}, "pairs": list(self.pairs)}


def read_config(file: Path) -> RunConfig:
    """Read the settings of a run.

    Args:
        file: YAML file of the run.

    Returns:
        Settings of the run, with the sizes of a new model where it names a file of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a YAML mapping, or a name in it is unknown, missing, or of the wrong kind.
    """
    content = read_yaml(file)
    if isinstance(model := content.get("model"), str) and model.endswith((".yaml", ".yml")):
        content["model"] = read_yaml(file.parent / model)
    return config_from(content, str(file))


def config_from(content: Mapping[str, Any], source: str) -> RunConfig:
    """Make the settings of a run from plain values.

    Args:
        content: Values by name, as YAML has them.
        source: Where they stand, as the subject of an error's sentence.

    Returns:
        The settings.

    Raises:
        ValueError: A name is unknown or missing, or its value is of the wrong kind.
    """
    return read_settings(RunConfig, content, source, owner="a run")
