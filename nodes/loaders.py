"""Load BLIP-Diffusion · Load BLIP-2 Q-Former · Load BLIP-Diffusion ControlNet · Load Tuned Subject."""

from __future__ import annotations

from ..blip_qformer.checkpoint import open_checkpoint
from ..blip_qformer.checkpoint.convert import CHECKPOINT_NAME, CONTROLNET_NAME
from ..blip_qformer.subject import Subject
from ..blip_qformer.subject.provenance import encoder_hash
from .host.checks import require_tuned_subject
from .host.managed import ManagedEncoder
from .host.model_paths import CHECKPOINTS, FileMarks, converted_files
from .host.networks import build_controlnet, build_networks, load_converted, load_converted_controlnet
from .types import CATEGORY, Blip2QFormer, BlipSubject, checkpoint_input, io, newer_fields


class CheckpointNode(io.ComfyNode):
    """What all nodes have in common that read a checkpoint."""

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool:
        """Refuse a checkpoint that is gone."""
        return CHECKPOINTS.validate(checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **_: object) -> FileMarks:
        """Tell the host to read other files under the same name again, such as after another fine-tuning."""
        return CHECKPOINTS.fingerprint(checkpoint)


class LoadBLIPDiffusion(CheckpointNode):
    """Loads all of a checkpoint: U-Net, text encoder and VAE for the stock nodes, and the Q-Former for ours."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionLoader",
            display_name="Load BLIP-Diffusion",
            category=CATEGORY,
            **newer_fields(
                ["checkpoint loader", "load checkpoint", "subject model", "salesforce blipdiffusion"], CATEGORY
            ),
            description="Loads a BLIP-Diffusion model. Start here. Connect model, clip and vae like those of Load "
            "Checkpoint, and qformer to BLIP-2 Subject Encode.",
            inputs=[checkpoint_input()],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The network that draws. Connect it to KSampler."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The part that reads prompts. Connect it to Subject Prompt Compose, and to CLIP Text "
                    "Encode for the negative prompt.",
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="The part that turns the result into a picture. Connect it to VAE Decode.",
                ),
                Blip2QFormer.Output(
                    display_name="qformer",
                    tooltip="The part that looks at pictures. Connect it to BLIP-2 Subject Encode.",
                ),
            ],
        )

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        """Open the checkpoint and build all of its networks."""
        opened = open_checkpoint(CHECKPOINTS.path(checkpoint))
        converted = converted_files(checkpoint).get(CHECKPOINT_NAME)
        networks = load_converted(converted) if converted else build_networks(opened)
        return io.NodeOutput(*networks, ManagedEncoder(opened))


class LoadBLIP2QFormer(CheckpointNode):
    """Loads only the Q-Former, beside a stock checkpoint loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionQFormerLoader",
            display_name="Load BLIP-2 Q-Former",
            category=CATEGORY,
            **newer_fields(["q-former", "qformer", "subject encoder loader"]),
            description="Loads only the part that looks at pictures, about 1 GB. Use it when the rest of the model is "
            "one file and comes from Load Checkpoint. The help page says how to make that file.",
            inputs=[checkpoint_input()],
            outputs=[
                Blip2QFormer.Output(
                    display_name="qformer",
                    tooltip="The part that looks at pictures. Connect it to BLIP-2 Subject Encode.",
                )
            ],
        )

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        """Open the checkpoint and build its subject encoder."""
        return io.NodeOutput(ManagedEncoder(open_checkpoint(CHECKPOINTS.path(checkpoint))))


class LoadBLIPDiffusionControlNet(CheckpointNode):
    """Loads the ControlNet that some published folders contain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionControlNetLoader",
            display_name="Load BLIP-Diffusion ControlNet",
            category=CATEGORY,
            **newer_fields(["controlnet loader", "canny controlnet"]),
            description="Loads the ControlNet of a BLIP-Diffusion folder. With a ControlNet, the new picture follows "
            "the edges of another picture: Salesforce/blipdiffusion-controlnet has one for Canny edges. Other SD1.5 "
            "ControlNets work too; load them with Load ControlNet Model.",
            inputs=[checkpoint_input()],
            outputs=[io.ControlNet.Output(display_name="control_net", tooltip="Connect it to Apply ControlNet.")],
        )

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        """Open the checkpoint and build its ControlNet."""
        if converted := converted_files(checkpoint).get(CONTROLNET_NAME):
            return io.NodeOutput(load_converted_controlnet(converted))
        opened = open_checkpoint(CHECKPOINTS.path(checkpoint))
        return io.NodeOutput(build_controlnet(opened.require("controlnet")))


class LoadTunedSubject(CheckpointNode):
    """Loads the subject of a checkpoint that was tuned with the authors' code."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionTunedSubjectLoader",
            display_name="Load Tuned Subject",
            category=CATEGORY,
            **newer_fields(["fine-tuned subject", "trained subject", "pth subject"]),
            description="Takes the subject out of a model file that was trained on one thing with the authors' own "
            "code, such as checkpoint_40.pth. You need no picture and no BLIP-2 Subject Encode then. To teach the "
            "model your own thing, use Subject Fine-tune.",
            inputs=[
                checkpoint_input(),
                io.String.Input(
                    "subject_word",
                    default="dog",
                    tooltip="What the thing is, in one to three English words. The file does not say it.",
                ),
            ],
            outputs=[
                BlipSubject.Output(
                    display_name="subject",
                    tooltip="Connect it to Subject Prompt Compose, or keep it with Save Subject.",
                )
            ],
        )

    @classmethod
    def execute(cls, checkpoint: str, subject_word: str) -> io.NodeOutput:
        """Open the checkpoint and read its subject."""
        opened = open_checkpoint(CHECKPOINTS.path(checkpoint))
        vectors = require_tuned_subject(opened)
        return io.NodeOutput(Subject(vectors, subject_word.strip(), encoder_hash(opened.encoder_state_dict)))


NODES = [LoadBLIPDiffusion, LoadBLIP2QFormer, LoadBLIPDiffusionControlNet, LoadTunedSubject]
