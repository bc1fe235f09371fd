"""The pipeline of a model under training, in and out of the Hub layout: what is trained is what Load BLIP-Diffusion reads.

U-Net and VAE are diffusers' own classes, the subject encoder is ours, and the text encoder is SD1.5's CLIP.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from mini.init.colour_vae import carry_colours
from mini.init.patch_positions import place_patches

from ..atomic import atomic_folder
from ..checkpoint import open_checkpoint
from ..checkpoint.components import Component, find_components
from ..checkpoint.detect import Kind
from ..checkpoint.layouts.hub import KEY_MAP
from ..checkpoint.write_safetensors import write_safetensors
from ..encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from ..encoder.tokenizer import VOCABULARY
from .clip_text_model import TextEncoder, TextEncoderConfig

SIZES = ("vision", "qformer", "projection_width", "text_encoder", "unet", "vae", "tokenizer")  # of a new model


KINDS = {"text_encoder": Kind.TEXT_ENCODER, "unet": Kind.UNET, "vae": Kind.VAE}


SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@dataclass(eq=False)
class Pipeline:
    """A whole BLIP-Diffusion model, its weights in float32 on the CPU unless moved."""

    encoder: SubjectEncoder
    text_encoder: TextEncoder
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The trainable pipeline by name."""
        return {"encoder": self.encoder, "text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    def check_widths(self) -> None:
        """Raises ValueError where the vectors are no words for the text encoder, or its words none for the U-Net."""
        vectors, words = self.encoder.config.qformer.width, self.text_encoder.config.width
        read = self.unet.config.cross_attention_dim
        if not vectors == words == read:
            raise ValueError(
                f"The Q-Former's vectors are {vectors} numbers wide, the text encoder's words {words}, and what the "
                f"U-Net reads {read}: all three must be the same."
            )


def load_pipeline(folder: Path) -> Pipeline:
    """Read a model in the Hub layout.

    Raises:
        ~blip_qformer.checkpoint.CheckpointError: a part is missing or damaged.
        ValueError: the tokenizer's files are missing.
    """
    checkpoint = open_checkpoint(folder)
    encoder = SubjectEncoder(checkpoint.encoder_config)
    encoder.load_state_dict(dict(checkpoint.encoder_state_dict))
    networks = {name: build_network(name, checkpoint.require(name)) for name in KINDS}
    if not (folder / "tokenizer" / "vocab.json").is_file():
        raise ValueError(f"{folder} has no tokenizer/vocab.json: download the published folder as a whole.")
    return Pipeline(encoder, **networks, tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"))


def build_network(name: str, part: Component) -> nn.Module:
    """A U-Net, VAE or text encoder with its published weights.

    Raises:
        ValueError: they do not fit their own config.
    """
    if name == "text_encoder":
        network = TextEncoder(TextEncoderConfig.from_hub(part.config))
        load = network.load_published
    else:
        network = (UNet2DConditionModel if name == "unet" else AutoencoderKL).from_config(part.config)
        load = network.load_state_dict
    try:
        load(dict(part.state_dict()))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{part.path} does not fit its own config ({reason}): download both again.") from error
    return network


def replace_network(pipeline: Pipeline, name: str, folder: Path) -> None:
    """Take one network from another folder, such as the U-Net from Stable Diffusion 1.5's.

    Raises:
        ValueError: there is no network of that name, or not in that folder.
    """
    if name == "encoder":
        checkpoint = open_checkpoint(folder)
        pipeline.encoder = SubjectEncoder(checkpoint.encoder_config)
        pipeline.encoder.load_state_dict(dict(checkpoint.encoder_state_dict))
        return
    if name not in KINDS:
        raise ValueError(f'"{name}" is no network of the model: choose encoder, {", ".join(KINDS)}.')
    found, problems = find_components(folder)
    if KINDS[name] not in found:
        raise ValueError(" ".join([f"{folder} has no {name}: name a folder in diffusers' layout.", *problems]))
    setattr(pipeline, name, build_network(name, found[KINDS[name]]))


def new_pipeline(sizes: dict[str, Any], seed: int) -> Pipeline:
    """An untrained model.

    Args:
        sizes: ``vision``, ``qformer``, ``projection_width``, ``text_encoder``, ``unet``, ``vae`` (fields of their
            configs), and ``tokenizer``, a folder with CLIP's vocabulary.
        seed: of the first weights.

    Raises:
        ValueError: a size is missing or unknown, or there is no vocabulary.
    """
    if differing := sorted(set(SIZES) ^ sizes.keys()):
        raise ValueError(f"A new model is given by {', '.join(SIZES)}; look at {', '.join(map(str, differing))}.")
    if not (Path(sizes["tokenizer"]) / "vocab.json").is_file():
        raise ValueError(f"The folder {sizes['tokenizer']} of the tokenizer has no vocab.json: name CLIP's.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision, qformer = _sized("vision", VisionConfig, sizes), _sized("qformer", QFormerConfig, sizes)
        encoder = SubjectEncoder(SubjectEncoderConfig(vision, qformer, sizes["projection_width"]))
        text_encoder = TextEncoder(_sized("text_encoder", TextEncoderConfig, sizes))
        for network, width in (
            (encoder.vision, vision.width),
            (encoder.qformer, qformer.width),
            (encoder.projection, qformer.width),
            (text_encoder, text_encoder.config.width),
        ):
            initialise(network, width)
        place_patches(encoder.vision.position_embedding)
        unet = _sized("unet", UNet2DConditionModel, sizes)
        vae = _sized("vae", AutoencoderKL, sizes)
        carry_colours(vae)
    tokenizer = CLIPTokenizer.from_pretrained(sizes["tokenizer"], model_max_length=text_encoder.config.positions)
    return Pipeline(encoder, text_encoder, unet, vae, tokenizer)


def _sized(name: str, kind: Callable[..., Any], sizes: dict[str, Any]) -> Any:
    """What one of the sizes' entries describes."""
    try:
        return kind(**sizes[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"The sizes of the new model's {name} do not fit: {error}.") from error


def initialise(network: nn.Module, width: int) -> None:
    """First weights as BERT and CLIP have them: normal, biases zero, norms neutral.

    Their deviation, 0.02, suits a width of 768. It grows as a network gets narrower, so that what a layer adds is as
    large.
    """
    deviation = 0.02 * (768 / width) ** 0.5
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=deviation)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | nn.LayerNorm):
                nn.init.normal_(parameter, std=deviation)


def save_pipeline(pipeline: Pipeline, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model in the Hub layout, all of it or nothing; one that is there is replaced when the new one is whole.

    Killed at the very moment of the exchange, both lie there under hidden names.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    with atomic_folder(folder) as temporary:
        _save_encoder(pipeline.encoder, temporary / "qformer", dtype)
        _save(
            pipeline.text_encoder.published(), pipeline.text_encoder.config.to_hub(), temporary / "text_encoder", dtype
        )
        for name, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
            network = getattr(pipeline, name)
            _save(network.state_dict(), _plain(network.config), temporary / name, dtype, file)
        pipeline.tokenizer.save_pretrained(temporary / "tokenizer")
        _write_json(temporary / "scheduler" / "scheduler_config.json", SCHEDULER)
        size = pipeline.encoder.config.vision.image_size
        _write_json(temporary / "image_processor" / "preprocessor_config.json", _image_processor(size))
        _write_json(temporary / "model_index.json", _model_index())
    return folder


def _save_encoder(encoder: SubjectEncoder, folder: Path, dtype: torch.dtype) -> None:
    vision, qformer = asdict(encoder.config.vision), asdict(encoder.config.qformer)
    config = {
        "vision_config": {
            "hidden_size": vision["width"],
            "intermediate_size": vision["feed_forward_width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layer_norm_eps": vision["layer_norm_eps"],
            "hidden_act": "quick_gelu",
        },
        "qformer_config": {
            "vocab_size": qformer["vocabulary_size"],
            "hidden_size": qformer["width"],
            "num_hidden_layers": qformer["layers"],
            "num_attention_heads": qformer["heads"],
            "intermediate_size": qformer["feed_forward_width"],
            "max_position_embeddings": qformer["text_positions"],
            "encoder_hidden_size": vision["width"],
            "cross_attention_frequency": qformer["cross_attention_frequency"],
            "layer_norm_eps": qformer["layer_norm_eps"],
            "hidden_act": "gelu",
        },
        "num_query_tokens": qformer["query_tokens"],
        "tokenizer": "bert-base-uncased",
    }
    _save(KEY_MAP.to_file(encoder.state_dict()), config, folder, dtype)
    shutil.copy(VOCABULARY, folder / "vocab.txt")


def _save(
    weights: dict[str, Tensor], config: dict[str, Any], folder: Path, dtype: torch.dtype, file: str = "model"
) -> None:
    _write_json(folder / "config.json", config)
    write_safetensors(folder / f"{file}.safetensors", weights, metadata={"format": "pt"}, dtype=dtype)


def _plain(config: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def _image_processor(size: int) -> dict[str, Any]:
    return {"image_processor_type": "BlipImageProcessor", "size": {"height": size, "width": size}}


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "BlipDiffusionPipeline",
        "ctx_begin_pos": 2,
        "image_processor": ["blip_diffusion", "BlipImageProcessor"],
        "qformer": ["blip_diffusion", "Blip2QFormerModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["blip_diffusion", "ContextCLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
