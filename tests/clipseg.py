"""A small CLIPSeg with random weights, as a checkpoint folder in the Hub's layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizerFast,
    ViTImageProcessor,
)

from tools.host import comfyui_path

TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def write_clipseg(folder: Path, seed: int = 0) -> Path:
    """transformers' own classes, saved by themselves; pictures of 64 pixels in patches of 16."""
    torch.manual_seed(seed)
    config = CLIPSegConfig(
        text_config={**TRANSFORMER, "num_hidden_layers": 2, "projection_dim": 32},
        vision_config={**TRANSFORMER, "num_hidden_layers": 3, "image_size": 64, "patch_size": 16},
        projection_dim=32,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        conditional_layer=0,
    )
    model = CLIPSegForImageSegmentation(config)
    for parameter in model.parameters():  # the usual beginning is so small that every pixel comes out as 0.5
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizerFast.from_pretrained(comfyui_path() / "comfy" / "sd1_tokenizer")
    pictures = ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    CLIPSegProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder
