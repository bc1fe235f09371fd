"""Load BLIP-Diffusion · Load BLIP-2 Q-Former · Load BLIP-Diffusion ControlNet · Load Tuned Subject."""

from __future__ import annotations

import logging

from ..blip_qformer.checkpoint import open_checkpoint
from ..blip_qformer.subject import Subject
from ..blip_qformer.subject.provenance import encoder_hash
from .host.managed import ManagedEncoder
from .host.model_paths import NOTHING_FOUND, checkpoint_path, list_checkpoints, missing_checkpoint
from .host.networks import build_clip, build_controlnet, build_model, build_vae
from .types import CATEGORY, Blip2QFormer, BlipSubject, io

log = logging.getLogger("blip_diffusion")


QFORMER_ALONE = "To use its Q-Former beside another loader, take Load BLIP-2 Q-Former."


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
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        return listed_or_reason(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        opened = open_checkpoint(checkpoint_path(checkpoint))
        unet, text_encoder, vae = (opened.require(part, QFORMER_ALONE) for part in ("unet", "text_encoder", "vae"))
        if opened.subject is not None:
            log.info(
                "%s also holds a tuned subject: Load Tuned Subject gives it to Subject Prompt Compose.", opened.path
            )
        return io.NodeOutput(build_model(unet, vae), build_clip(text_encoder), build_vae(vae), ManagedEncoder(opened))


class LoadBLIP2QFormer(io.ComfyNode):
    """The Q-Former alone, beside a stock checkpoint loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIPDiffusionQFormerLoader",
            display_name="Load BLIP-2 Q-Former",
            category=CATEGORY,
            description="Loads only the part that reads pictures, about 1 GB in float16. Use it beside a Load "
            "Checkpoint that loads the converted file; the help page says how to convert.",
            inputs=[checkpoint_input()],
            outputs=[Blip2QFormer.Output(display_name="qformer", tooltip="For BLIP-2 Subject Encode.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        return listed_or_reason(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        return io.NodeOutput(ManagedEncoder(open_checkpoint(checkpoint_path(checkpoint))))


class LoadBLIPDiffusionControlNet(io.ComfyNode):
    """The ControlNet that some published folders bring."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIPDiffusionControlNetLoader",
            display_name="Load BLIP-Diffusion ControlNet",
            category=CATEGORY,
            description="Loads the ControlNet inside a BLIP-Diffusion folder: Salesforce/blipdiffusion-controlnet has "
            "one for Canny edges. Goes to Apply ControlNet. Any other SD1.5 ControlNet works as well, with the stock "
            "loader.",
            inputs=[checkpoint_input()],
            outputs=[io.ControlNet.Output(display_name="control_net", tooltip="For Apply ControlNet.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        return listed_or_reason(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        return io.NodeOutput(build_controlnet(open_checkpoint(checkpoint_path(checkpoint)).require("controlnet")))


class LoadTunedSubject(io.ComfyNode):
    """The subject inside a checkpoint that the authors' code has tuned."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIPDiffusionTunedSubjectLoader",
            display_name="Load Tuned Subject",
            category=CATEGORY,
            description="A checkpoint that was tuned with the authors' code, such as checkpoint_40.pth, holds the "
            "subject it was tuned on. This takes it out; no picture and no BLIP-2 Subject Encode is needed then.",
            inputs=[
                checkpoint_input(),
                io.String.Input(
                    "subject_word", default="dog", tooltip="What the subject is. The checkpoint itself does not say."
                ),
            ],
            outputs=[
                BlipSubject.Output(display_name="subject", tooltip="For Subject Prompt Compose, or Save Subject.")
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        return listed_or_reason(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, subject_word: str) -> io.NodeOutput:
        opened = open_checkpoint(checkpoint_path(checkpoint))
        if opened.subject is None:
            raise ValueError(
                f"{opened.path} holds no tuned subject: choose a checkpoint that was tuned on one, or make a subject "
                "of a picture with BLIP-2 Subject Encode."
            )
        return io.NodeOutput(Subject(opened.subject, subject_word.strip(), encoder_hash(opened.encoder_state_dict)))


def listed_or_reason(checkpoint: str | None) -> bool | str:
    """True, or why the graph cannot be queued: nothing to load. What comes over a link is not known yet (None)."""
    if checkpoint is not None and (checkpoint == NOTHING_FOUND or checkpoint not in list_checkpoints()):
        return missing_checkpoint(checkpoint)
    return True


NODES = [LoadBLIPDiffusion, LoadBLIP2QFormer, LoadBLIPDiffusionControlNet, LoadTunedSubject]
