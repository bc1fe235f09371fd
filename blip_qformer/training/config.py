"""A run is one YAML file: which stage, on which pairs, from which model, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..extras import import_extra

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does.

    Args:
        stage: which module of :mod:`.stages` trains.
        model: the folder, in the Hub layout, that the run starts from; or the sizes of a new model, as a mapping or as
            the name of a YAML file beside the run's.
        networks: the folders of those networks (``encoder``, ``text_encoder``, ``unet``, ``vae``) that do not come from
            ``model``: the U-Net, text encoder and VAE of Stable Diffusion for a new Q-Former, for example.
        pairs: folders, shards or patterns, see :class:`~.shards.PairStream`.
        output: the folder for checkpoints, logs and the trained model; several machines need one that they share.
        seed: of new weights, of the pairs' order, and of all noise.
        steps: how often the weights are updated.
        batch_size: pairs a process reads at once; times processes times gradient_accumulation is what one update sees.
        learning_rate, warmup_steps, schedule, weight_decay, betas, epsilon, max_grad_norm: AdamW's and what is
            around it; a max_grad_norm of 0 does not clip.
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        gradient_checkpointing: recompute the U-Net's activations instead of keeping them.
        ema_decay: of the weights' moving average, which is what is saved at the end; 0 saves the weights.
        save_dtype: precision of the trained model's files.
        num_workers: processes that read pairs, for each training process.
        shuffle_buffer: how many pairs each of them mixes, see :class:`~.shards.PairStream`.
        checkpoint_every, validate_every, log_every: in steps; 0 never.
        options: what only this stage has.
    """

    stage: str
    model: str | dict[str, Any]
    pairs: tuple[str, ...]
    output: Path
    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    gradient_accumulation: int = 1
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    ema_decay: float = 0.0
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    num_workers: int = 1
    shuffle_buffer: int = 1000
    networks: dict[str, str] = field(default_factory=dict)
    checkpoint_every: int = 1000
    validate_every: int = 0
    log_every: int = 20
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def data_order(self) -> dict[str, Any]:
        """What decides which pair comes when, as JSON has it."""
        names = ("seed", "batch_size", "gradient_accumulation", "num_workers", "shuffle_buffer")
        return {**{name: getattr(self, name) for name in names}, "pairs": list(self.pairs)}


#: Settings with a smallest value other than 0.
SMALLEST = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1}


def read_config(file: Path) -> RunConfig:
    """A run's file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no YAML mapping, or a name in it is unknown, missing, or of the wrong kind.
    """
    content = _read_yaml(file)
    if str(content.get("model")).endswith((".yaml", ".yml")):
        content["model"] = _read_yaml(file.parent / content["model"])
    return config_from(content, str(file))


def _read_yaml(file: Path) -> dict[str, Any]:
    yaml = import_extra("yaml", "Reading a run's file")
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}: see blip_qformer/training/runs/ for examples.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML ({error}): see blip_qformer/training/runs/ for examples.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no mapping of names to values: see blip_qformer/training/runs/ for examples.")
    return content


def config_from(content: Mapping[str, Any], source: str) -> RunConfig:
    """A run's settings from plain values; ``source`` is where they stand, for the error."""
    known = {each.name: each for each in fields(RunConfig)}
    if unknown := sorted(map(str, content.keys() - known.keys())):
        raise ValueError(f"{source} sets {', '.join(unknown)}, which no run has: choose from {', '.join(known)}.")
    required = {name for name, each in known.items() if each.default is each.default_factory is MISSING}
    if missing := sorted(required - content.keys()):
        raise ValueError(f"{source} does not set {', '.join(missing)}, which every run needs.")
    kinds = get_type_hints(RunConfig)
    config = RunConfig(**{name: checked(name, value, kinds[name], source) for name, value in content.items()})
    for name, smallest in SMALLEST.items():
        if getattr(config, name) < smallest:
            raise ValueError(f"{source} sets {name} to {getattr(config, name)}, where at least {smallest} is needed.")
    if config.ema_decay >= 1:
        raise ValueError(f"{source} sets ema_decay to {config.ema_decay}, where less than 1 is needed.")
    return config


def checked(name: str, value: Any, kind: Any, source: str) -> Any:
    """A plain value as what is meant, for YAML reads ``1e-4`` as text, ``no`` as false, and a pair as a list.

    Args:
        kind: the type that is needed; see ``_KINDS``.
        source: where the value stands, as the error's subject.

    Raises:
        ValueError: it is nothing of that kind.
    """
    if choices := get_args(kind) if get_origin(kind) is Literal else ():
        read, needed = _choice_of(choices), f"one of {', '.join(choices)}"
    else:
        read, needed = _KINDS[kind]
    try:
        return read(value)
    except (TypeError, ValueError):
        raise ValueError(f"{source} sets {name} to {value!r}, where {needed} is needed.") from None


def _choice_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    return lambda value: choices[choices.index("no" if value is False else value)]


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise ValueError
    return number


def _whole_number(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _two_numbers(value: Any) -> tuple[float, float]:
    first, second = value
    return _number(first), _number(second)


def _instance(*types: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, types):
            raise TypeError
        return value

    return read


def _text(value: Any) -> str:
    return str(_instance(str, Path)(value))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, value)) if isinstance(value, list | tuple) and value else (_text(value),)


def _texts_by_name(value: Any) -> dict[str, str]:
    return {_text(name): _text(text) for name, text in _instance(dict)(value).items()}


def _folder_or_sizes(value: Any) -> str | dict[str, Any]:
    return value if isinstance(value, dict) else _text(value)


#: How each type of setting is read, and what it is called.
_KINDS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_whole_number, "a whole number, 0 or more,"),
    float: (_number, "a number, 0 or more,"),
    bool: (_instance(bool), "true or false"),
    str: (_text, "a name"),
    Path: (Path, "a folder"),
    tuple[float, float]: (_two_numbers, "a list of two numbers"),
    tuple[str, ...]: (_texts, "a folder, a pattern of shards, or a list of them,"),
    dict[str, Any]: (_instance(dict), "a mapping"),
    dict[str, str]: (_texts_by_name, "a mapping of names to folders"),
    str | dict[str, Any]: (_folder_or_sizes, "a folder, or a mapping of sizes,"),
}
