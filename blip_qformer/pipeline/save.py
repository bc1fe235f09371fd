"""Write a BLIP-Diffusion model in the Hub layout, which diffusers and Load BLIP-Diffusion read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import atomic_folder
from ..checkpoint.layouts.hub import KEY_MAP
from ..checkpoint.write_safetensors import write_safetensors
from ..encoder import SubjectEncoder, SubjectEncoderConfig
from ..encoder.tokenizer import VOCABULARY
from .pipeline import SCHEDULER_CONFIG, Pipeline

MODEL_INDEX = {
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


def save_pipeline(pipeline: Pipeline, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model in the Hub layout, whole or not at all; one that is there is replaced when the new one is whole.

    Args:
        pipeline: The model.
        folder: The folder to write.
        dtype: Precision of the files.

    Returns:
        The folder.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    text_encoder, image_size = pipeline.text_encoder, pipeline.encoder.config.vision.image_size
    with atomic_folder(folder) as temporary:
        _save_encoder(pipeline.encoder, temporary / "qformer", dtype)
        _save_network(
            temporary / "text_encoder", "model", text_encoder.hub_state_dict(), text_encoder.config.to_hub(), dtype
        )
        for name, network in (("unet", pipeline.unet), ("vae", pipeline.vae)):
            config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
            _save_network(temporary / name, "diffusion_pytorch_model", network.state_dict(), config, dtype)
        pipeline.tokenizer.save_pretrained(temporary / "tokenizer")
        _write_json(temporary / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
        _write_json(temporary / "image_processor" / "preprocessor_config.json", _image_processor_config(image_size))
        _write_json(temporary / "model_index.json", MODEL_INDEX)
    return folder


def _save_encoder(encoder: SubjectEncoder, folder: Path, dtype: torch.dtype) -> None:
    _save_network(folder, "model", KEY_MAP.to_file(encoder.state_dict()), _encoder_config(encoder.config), dtype)
    shutil.copy(VOCABULARY, folder / "vocab.txt")


def _save_network(
    folder: Path, name: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    _write_json(folder / "config.json", config)
    write_safetensors(folder / f"{name}.safetensors", state_dict, metadata={"format": "pt"}, dtype=dtype)


def _encoder_config(config: SubjectEncoderConfig) -> dict[str, Any]:
    """The subject encoder's ``config.json``."""
    vision, qformer = asdict(config.vision), asdict(config.qformer)
    return {
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


def _image_processor_config(size: int) -> dict[str, Any]:
    return {"image_processor_type": "BlipImageProcessor", "size": {"height": size, "width": size}}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
