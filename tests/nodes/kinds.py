"""Small random models of the kinds that ComfyUI knows, made of its own classes and configs."""

from __future__ import annotations

from typing import Any

import torch

#: Of U-Nets with a cross-attention in their second level.
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
LINEAR = {**UNET, "use_linear_in_transformer": True}

#: Kind -> the host's config class, and its sizes without those that follow from the conditioning.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "inpainting": ("SD15", {**UNET, "in_channels": 9}),
    "InstructPix2Pix": ("SD15_instructpix2pix", {**UNET, "in_channels": 8}),
    "SD2": ("SD20", LINEAR),
    "SDXL": ("SDXL", {**LINEAR, "num_classes": "sequential"}),
    "SD3": ("SD3", {"in_channels": 16, "depth": 2, "pos_embed_scaling_factor": None, "pos_embed_max_size": 16}),
}
SIZES_BESIDE_POOLED = 6 * 256  # what SDXL's U-Net reads beside the pooled output: six sizes


def build(kind: str, width: int, pooled: int) -> Any:
    """Build the MODEL of a kind.

    Args:
        kind: One of :data:`KINDS`.
        width: Width of a conditioning's tokens.
        pooled: Width of its pooled output.
    """
    import comfy.model_patcher
    import comfy.supported_models

    name, sizes = KINDS[kind]
    if kind == "SD3":
        embedder = {"target": "torch.nn.Linear", "params": {"in_features": width, "out_features": 128}}
        sizes = {**sizes, "adm_in_channels": pooled, "context_embedder_config": embedder}
    else:
        sizes = {**sizes, "context_dim": width}
    if kind == "SDXL":
        sizes["adm_in_channels"] = pooled + SIZES_BESIDE_POOLED
    torch.manual_seed(0)
    model = getattr(comfy.supported_models, name)(sizes).get_model({}, "")
    for name, weight in model.diffusion_model.named_parameters():
        gain = 1.5 if "attn2" in name else 0.5  # so that words show
        torch.nn.init.normal_(weight, std=gain / max(weight[0].numel(), 4) ** 0.5)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)
