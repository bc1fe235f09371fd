"""Checkpoints with random weights, written exactly as they are published, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tests import oracle
from tests.oracle import SMALL, Sizes

#: Small enough for a CPU, with the text encoder's real vocabulary: what the workflows draw noise with.
DEMO = Sizes(
    image_size=112,
    vision_width=128,
    vision_layers=4,
    width=128,
    qformer_layers=3,
    qformer_heads=2,
    text_layers=3,
    unet_channels=(32, 64, 64),
    unet_attention=(False, True, True),  # none where a picture has the most tokens
    vae_channels=(32, 32, 32, 32),
)


def build_demo_checkpoint(folder: Path, host: Path) -> Path:
    """Write the demo's checkpoint, a Hub folder of random weights, unless it is there already."""
    if not (folder / "model_index.json").is_file():  # written last, so what is there is whole
        write_hub_folder(oracle.pipeline(DEMO, folder / "tokenizer", host), folder)
    return folder


def write_hub_folder(
    pipeline: oracle.BlipDiffusionPipeline,
    folder: Path,
    safetensors: bool = False,
    controlnet: oracle.ControlNetModel | None = None,
) -> Path:
    """A pipeline as ``Salesforce/blipdiffusion`` is published: a folder for each part, weights as pickles.

    With a ControlNet it is ``Salesforce/blipdiffusion-controlnet``.
    """
    if controlnet is not None:
        controlnet.save_pretrained(folder / "controlnet", safe_serialization=safetensors)
    for name in ("qformer", "text_encoder", "unet", "vae"):
        getattr(pipeline, name).save_pretrained(folder / name, safe_serialization=safetensors)
    pipeline.image_processor.save_pretrained(folder / "image_processor")
    pipeline.save_config(folder)
    return folder


def shorten_config(folder: Path) -> None:
    """Leave out of ``qformer/config.json`` what some published ones leave out; for sizes that equal the defaults."""
    path = folder / "qformer" / "config.json"
    config = json.loads(path.read_text())
    kept = {
        "qformer_config": {"encoder_hidden_size", "cross_attention_frequency", "vocab_size"},
        "vision_config": {"hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "layer_norm_eps"},
    }
    short = {part: {k: v for k, v in config[part].items() if k in names} for part, names in kept.items()}
    path.write_text(json.dumps(short))


def write_lavis_folder(pipeline: oracle.BlipDiffusionPipeline, folder: Path, subject: Tensor | None = None) -> Path:
    """The same weights as the authors' own code saves them, stage-1 heads included."""
    qformer, projection = lavis_weights(pipeline)
    _save(qformer, folder / "blip_model" / "blip_weight.pt")
    _save(projection, folder / "proj_layer" / "proj_weight.pt")
    for name, file in (
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ):
        _save(getattr(pipeline, name).state_dict(), folder / name / file)
    for name in ("unet", "vae"):
        getattr(pipeline, name).save_config(folder / name)
    if subject is not None:
        _save(subject, folder / "ctx_embeddings_cache" / "ctx_embeddings_cache.pt")
    return folder


def write_finetuned(pipeline: oracle.BlipDiffusionPipeline, file: Path, subject: Tensor) -> Path:
    """The same weights as the authors' fine-tuning saves them: one state dict under ``model``."""
    qformer, projection = lavis_weights(pipeline)
    parts = {
        "blip.": qformer,
        "proj_layer.": projection,
        **{f"{name}.": getattr(pipeline, name).state_dict() for name in ("unet", "vae", "text_encoder")},
    }
    model = {f"{prefix}{name}": weight for prefix, weights in parts.items() for name, weight in weights.items()}
    return _save({"model": {**model, "ctx_embeddings_cache": subject}, "epoch": 40}, file)


def lavis_weights(pipeline: oracle.BlipDiffusionPipeline) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Q-Former and projection in LAVIS's names, written out here apart from the table that reads them."""
    theirs = {}
    for name, weight in pipeline.qformer.state_dict().items():
        if name.startswith("visual_encoder."):
            name = (
                name.replace("embeddings.class_embedding", "class_embedding")
                .replace("embeddings.patch_embedding", "conv1")
                .replace("embeddings.position_embedding", "positional_embedding")
                .replace("pre_layernorm", "ln_pre")
                .replace("visual_encoder.post_layernorm", "ln_vision")
                .replace("encoder.layers", "transformer.resblocks")
                .replace("layer_norm1", "ln_1")
                .replace("layer_norm2", "ln_2")
                .replace("self_attn.qkv.", "attn.in_proj_")
                .replace("self_attn.projection", "attn.out_proj")
                .replace("mlp.fc1", "mlp.c_fc")
                .replace("mlp.fc2", "mlp.c_proj")
            )
            if name.endswith(("class_embedding", "positional_embedding")):
                weight = weight[0, 0] if name.endswith("class_embedding") else weight[0]
        elif not name.startswith(("proj_layer.", "query_tokens")):
            name = "Qformer.bert." + name.replace("attention.attention.", "attention.self.")
        theirs[name] = weight
    projection = {name.removeprefix("proj_layer."): w for name, w in theirs.items() if name.startswith("proj_layer.")}
    qformer = {name: w for name, w in theirs.items() if not name.startswith("proj_layer.")}
    width = pipeline.qformer.config.qformer_config.hidden_size
    stage_1 = {
        "vision_proj.weight": torch.zeros(256, width),
        "text_proj.weight": torch.zeros(256, width),
        "itm_head.weight": torch.zeros(2, width),
        "itm_head.bias": torch.zeros(2),
        "temp": torch.tensor(0.07),
        "Qformer.cls.predictions.bias": torch.zeros(30523),
    }
    return {**qformer, **stage_1}, projection


def _save(content: object, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


__all__ = [
    "DEMO",
    "SMALL",
    "build_demo_checkpoint",
    "shorten_config",
    "write_finetuned",
    "write_hub_folder",
    "write_lavis_folder",
]
