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
            **newer_fields(["subject prompt", "image prompt", "text encode with subject", "style transfer"], CATEGORY),
            description='Puts your subject into a prompt, such as "a <subject> dog swimming underwater". Connect '
            "the result to KSampler as positive. For the negative prompt, use CLIP Text Encode.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The part of the model that reads prompts. Connect clip of Load BLIP-Diffusion, or of "
                    "Load Checkpoint with a converted BLIP-Diffusion file.",
                ),
                BlipSubject.Input("subject", tooltip="Your thing, from BLIP-2 Subject Encode or Load Subject."),
                io.String.Input(
                    "prompt",
                    default="swimming underwater",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the subject does, where it is, in which style, in English: swimming underwater. Do "
                    'not name the subject here; "a" and its word are put in front for you. (word:1.2) and '
                    "embedding:name work as usual.",
                ),
                io.String.Input(
                    "target_subject",
                    default="",
                    placeholder="the subject's own word",
                    tooltip="What to draw. Empty: the subject itself. Another word draws that thing in the look of "
                    "the subject. Example: the picture shows a flower and you write teapot; you get a teapot that "
                    "looks like the flower.",
                ),
                io.Float.Input(
                    "prompt_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the prompt counts beside your subject. 1: as the authors do; the prompt is said "
                    "many times. Lower: it is said less often, and the picture becomes more like your subject; at "
                    "0.05 it is said once. If the picture ignores the prompt, make the prompt shorter.",
                ),
                advanced(
                    io.Int.Input(
                        "repetitions",
                        default=20,
                        min=1,
                        max=100,
                        tooltip="How many times the prompt is said at prompt_strength 1. The authors say it 20 times, "
                        "so that it counts beside the subject. Set 1 if you edit single words of the prompt with "
                        "another node.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "overflow",
                        options=list(OVERFLOWS),
                        default=OVERFLOWS[0],
                        tooltip="What happens to a prompt that is too long. The model reads 77 tokens (pieces of "
                        "words) at once, and the subject needs 16 of them. truncate: the rest is dropped, as the "
                        "model was trained. continue: the rest is read as a second block, as ComfyUI does with long "
                        "prompts.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "subject_strength",
                        default=1.0,
                        min=0.0,
                        max=2.0,
                        step=0.05,
                        tooltip="How strong the subject is. 1: as trained. Change it in small steps, such as 0.9 or "
                        "1.1. 0: no subject, only the prompt.",
                    )
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The finished prompt. Connect it to positive of KSampler."
                ),
                io.String.Output(display_name="text", tooltip="Text to read: all that was written for you."),
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
