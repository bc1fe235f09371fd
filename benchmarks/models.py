"""The networks that are measured: the reference's, and ours on the same tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch

from blip_qformer.checkpoint.layouts.hub import KEY_MAP
from blip_qformer.encoder import SubjectEncoder
from tests import oracle
from tests.host import Host
from tools.host import comfyui_path

#: The published encoder and text encoder; the U-Net is SD1.5's in everything but its width, which a CPU cannot carry.
CPU_SIZES = dataclasses.replace(oracle.FULL, unet_channels=(128, 256, 512, 512), vae_channels=(32, 32, 32, 32))
SIZES = oracle.FULL if torch.cuda.is_available() else CPU_SIZES


def reference_pipeline(folder: Path) -> oracle.BlipDiffusionPipeline:
    """Make the reference at full size with random weights, on the device."""
    return oracle.pipeline(SIZES, folder, comfyui_path()).to("cuda" if torch.cuda.is_available() else "cpu")


def encoder_of(pipeline: oracle.BlipDiffusionPipeline) -> SubjectEncoder:
    """Make our encoder of the reference's own tensors, without a copy."""
    encoder = SubjectEncoder(device="meta")
    encoder.load_state_dict(KEY_MAP.to_encoder(pipeline.qformer.state_dict(), Path("reference")), assign=True)
    return encoder.eval().requires_grad_(False)


def hosted(host: Host, pipeline: oracle.BlipDiffusionPipeline) -> SimpleNamespace:
    """Load the same weights as Load BLIP-Diffusion does: ``model``, ``clip`` and ``qformer``."""
    checkpoint, networks = host.module("blip_qformer.checkpoint"), host.module("nodes.host.networks")
    path = Path("reference")

    def component(name: str):
        network = getattr(pipeline, name)
        return checkpoint.Component(path, dict(network.config), network.state_dict)

    opened = checkpoint.Checkpoint(
        path=path,
        format="the reference",
        encoder_state_dict=KEY_MAP.to_encoder(pipeline.qformer.state_dict(), path),
        encoder_config=host.module("blip_qformer.encoder").SubjectEncoderConfig(),
        encoder_path=path,
    )
    return SimpleNamespace(
        model=networks.build_model(component("unet"), component("vae")),
        clip=networks.build_clip(checkpoint.Component(path, {}, pipeline.text_encoder.state_dict)),
        qformer=host.module("nodes.host.managed").ManagedEncoder(opened),
    )
