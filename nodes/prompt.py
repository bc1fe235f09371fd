"""Subject Prompt Compose."""

from __future__ import annotations

from ..blip_qformer.prompt import OVERFLOWS, Overflow, compose_prompt
from ..blip_qformer.subject import Subject
from .host.conditioning import encode_subject_prompt
from .host.subject_rows import expect_an_image_for_each_subject
from .types import CATEGORY, BlipSubject, advanced, io, newer_fields


class SubjectPromptCompose(io.ComfyNode):
    """Encodes a prompt with a subject in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionPromptCompose",
            display_name="Subject Prompt Compose",
            category=CATEGORY,
            **newer_fields(["subject prompt", "image prompt", "text encode with subject"], CATEGORY),
            description='Writes "a <the subject> <target> <prompt>" and encodes it. Goes to KSampler as the positive '
            "conditioning; the negative is a plain CLIP Text Encode.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the BLIP-Diffusion checkpoint."),
                BlipSubject.Input("subject", tooltip="From BLIP-2 Subject Encode."),
                io.String.Input(
                    "prompt",
                    default="swimming underwater",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip='What the subject does, where it is, in which style. "a" and the subject\'s word go in '
                    "front by themselves. (word:1.2) and embedding:name work as everywhere.",
                ),
                io.String.Input(
                    "target_subject",
                    default="",
                    placeholder="the subject's own word",
                    tooltip="What to draw. Empty: the subject itself. Another word draws that thing in the subject's "
                    "style: a flower's picture and the word teapot make a teapot of that flower's look.",
                ),
                io.Float.Input(
                    "prompt_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How often the prompt is said again, as a part of repetitions. 1: as often as fits, as the "
                    "authors do. Lower values say it less often, and the subject begins to dominate; 0.05 of 20 says "
                    "it once.",
                ),
                advanced(
                    io.Int.Input(
                        "repetitions",
                        default=20,
                        min=1,
                        max=100,
                        tooltip="The authors say the prompt 20 times to make it heard beside the subject.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "overflow",
                        options=list(OVERFLOWS),
                        default=OVERFLOWS[0],
                        tooltip="What happens to tokens that do not fit 77. truncate: they are dropped, as the "
                        "model was trained. continue: they go into further blocks, as ComfyUI does with long prompts.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "subject_strength",
                        default=1.0,
                        min=0.0,
                        max=2.0,
                        step=0.05,
                        tooltip="ComfyUI's own token weight on the subject. 1: as trained. 0: the plain prompt "
                        "without the subject, cut or continued the same way.",
                    )
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For KSampler's positive input."),
                io.String.Output(display_name="text", tooltip="The whole text that was composed, for reading."),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        subject: Subject,
        prompt: str,
        target_subject: str,
        prompt_strength: float,
        repetitions: int,
        overflow: Overflow,
        subject_strength: float,
    ) -> io.NodeOutput:
        """Compose the text and encode it with the subject's vectors in it."""
        text = compose_prompt(prompt, target_subject.strip() or subject.word, prompt_strength, repetitions)
        conditioning = encode_subject_prompt(clip, subject, text, overflow, subject_strength)
        return io.NodeOutput(expect_an_image_for_each_subject(conditioning), text)


NODES = [SubjectPromptCompose]
