"""A new, untrained BLIP-Diffusion model of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ..checkpoint.network_config import NetworkConfig
from ..encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from ..plain_data import shown, validate
from .clip_text_model import CLIPTextModel, CLIPTextModelConfig
from .pipeline import Pipeline, load_tokenizer

CONFIGS = (VisionConfig, QFormerConfig, CLIPTextModelConfig)  # those that are checked as they are made
SIZES = ("vision", "qformer", "projection_width", "text_encoder", "unet", "vae", "tokenizer")

#: Changes a new model's random weights in place.
Initialiser = Callable[[Pipeline], None]


def new_pipeline(sizes: Mapping[str, Any], seed: int, initialise: Initialiser | None = None) -> Pipeline:
    """Make an untrained model.

    Args:
        sizes: ``vision``, ``qformer``, ``projection_width``, ``text_encoder``, ``unet`` and ``vae``, the fields of
            their configs; and ``tokenizer``, a folder with CLIP's vocabulary.
        seed: Seed of the random weights.
        initialise: A function that changes the random weights in place; it runs under the same seed.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ValueError: A size is missing or unknown, or there is no vocabulary.
    """
    if differing := sorted(set(SIZES) ^ sizes.keys()):
        raise ValueError(f"A new model is given by {', '.join(SIZES)}; look at {', '.join(map(str, differing))}.")
    if not isinstance(sizes["tokenizer"], str | Path):
        raise ValueError(f"The tokenizer of a new model is {shown(sizes['tokenizer'])}: name a folder with CLIP's.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision, qformer = _build("vision", VisionConfig, sizes), _build("qformer", QFormerConfig, sizes)
        encoder = SubjectEncoder(
            validate(
                SubjectEncoderConfig,
                {"vision": vision, "qformer": qformer, "projection_width": sizes["projection_width"]},
                "The new model",
            )
        )
        text_encoder = CLIPTextModel(_build("text_encoder", CLIPTextModelConfig, sizes))
        init_weights(encoder.vision, vision.width)
        init_weights(encoder.qformer, qformer.width)
        init_weights(encoder.projection, qformer.width)
        init_weights(text_encoder, text_encoder.config.width)
        unet = _build("unet", UNet2DConditionModel, sizes)
        vae = _build("vae", AutoencoderKL, sizes)
        tokenizer = load_tokenizer(Path(sizes["tokenizer"]), model_max_length=text_encoder.config.positions)
        pipeline = Pipeline(encoder, text_encoder, unet, vae, tokenizer)
        if initialise:
            initialise(pipeline)
    return pipeline


def init_weights(network: nn.Module, width: int) -> None:
    """Initialise weights as BERT and CLIP do, in place: normal, biases zero, norms neutral.

    BERT's and CLIP's standard deviation, 0.02, suits a width of 768. Here the deviation grows as a network gets
    narrower, so that the output of a layer keeps its variance.

    Args:
        network: The network that is initialised.
        width: Width of the network in numbers.
    """
    std = 0.02 * (768 / width) ** 0.5
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif not isinstance(module, nn.LayerNorm):
            for parameter in module.parameters(recurse=False):  # such as query tokens and position embeddings
                nn.init.normal_(parameter, std=std)


def _build(name: str, kind: Callable[..., Any], sizes: Mapping[str, Any]) -> Any:
    """Build the config or network that an entry of the sizes describes."""
    try:
        if not isinstance(sizes[name], Mapping):
            raise TypeError(f"they are {shown(sizes[name])} and no mapping")
        if kind in CONFIGS:
            return validate(kind, dict(sizes[name]), f"the new model's {name}")
        validate(NetworkConfig, dict(sizes[name]), f"the new model's {name}")
        return kind(**sizes[name])
    except MemoryError:
        raise
    except Exception as error:  # diffusers checks no values, so a wrong one can raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"The sizes of the new model's {name} do not fit: {reason.rstrip('.')}.") from error
