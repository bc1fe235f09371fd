"""Load BLIP-Diffusion · Load BLIP-2 Q-Former."""

from __future__ import annotations

from ..blip_qformer.checkpoint import open_checkpoint
from .folders import NOTHING_FOUND, checkpoint_path, list_checkpoints, missing_checkpoint
from .networks import build_clip, build_model, build_vae
from .qformer import HostedQFormer
from .types import CATEGORY, Blip2QFormer, io


def checkpoint_input() -> io.Combo.Input:
    """The drop-down list both loaders have."""
    return io.Combo.Input(
        "checkpoint",
        options=list_checkpoints(),
        tooltip="A folder or file in models/blip_diffusion (or a BLIP-Diffusion folder in models/diffusers): "
        "Salesforce/blipdiffusion as downloaded, an original LAVIS folder, a fine-tuned .pth, or "
        "blip2_qformer.safetensors.",
    )


class LoadBLIPDiffusion(io.ComfyNode):
    """A whole checkpoint: U-Net, text encoder and VAE for the stock nodes, and the Q-Former for ours."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIPDiffusionLoader",
            display_name="Load BLIP-Diffusion",
            category=CATEGORY,
            description="Loads everything a BLIP-Diffusion checkpoint holds. MODEL, CLIP and VAE go where a Load "
            "Checkpoint's would go; the Q-Former goes to BLIP-2 Subject Encode.",
            inputs=[checkpoint_input()],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tuned U-Net, for KSampler."),
                io.Clip.Output(display_name="clip", tooltip="The tuned text encoder, for Subject Prompt Compose."),
                io.Vae.Output(display_name="vae", tooltip="For VAE Decode."),
                Blip2QFormer.Output(display_name="qformer", tooltip="For BLIP-2 Subject Encode."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return listed_or_reason(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        opened = open_checkpoint(checkpoint_path(checkpoint))
        unet, text_encoder, vae = (opened.require(part) for part in ("unet", "text_encoder", "vae"))
        return io.NodeOutput(build_model(unet, vae), build_clip(text_encoder), build_vae(vae), HostedQFormer(opened))


class LoadBLIP2QFormer(io.ComfyNode):
    """The Q-Former alone, beside a stock checkpoint loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIPDiffusionQFormerLoader",
            display_name="Load BLIP-2 Q-Former",
            category=CATEGORY,
            description="Loads only the part that reads pictures, about 1 GB in float16. Use it beside a Load "
            'Checkpoint with the checkpoint that "blip-qformer convert" writes.',
            inputs=[checkpoint_input()],
            outputs=[Blip2QFormer.Output(display_name="qformer", tooltip="For BLIP-2 Subject Encode.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return listed_or_reason(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        return io.NodeOutput(HostedQFormer(open_checkpoint(checkpoint_path(checkpoint))))


def listed_or_reason(checkpoint: str) -> bool | str:
    """True, or why the graph cannot be queued: nothing to load."""
    if checkpoint == NOTHING_FOUND or checkpoint not in list_checkpoints():
        return missing_checkpoint(checkpoint)
    return True


NODES = [LoadBLIPDiffusion, LoadBLIP2QFormer]
