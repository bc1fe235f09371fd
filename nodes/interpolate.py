"""Subject Interpolate · Subject Trajectory · Subject Grid."""

from __future__ import annotations

from torch import Tensor

from ..blip_qformer.imaging.contact_sheet import contact_sheet
from ..blip_qformer.subject.blending import BlendMode, blend, describe_blend, trajectory
from ..blip_qformer.subject.subject import Subject, split_rows
from ..blip_qformer.subject.weights import parse_weights, slider_weights, trajectory_labels
from .host.checks import require_in_order
from .host.latents import Latent, repeat_for_batches
from .types import CATEGORY, BlipSubject, advanced, blend_mode_input, io, newer_fields, slider_input

BEYOND = (-1.0, 2.0)  # of a slider from one subject at 0 to another at 1


class SubjectInterpolate(io.ComfyNode):
    """Blends two to four subjects into one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectInterpolate",
            display_name="Subject Interpolate",
            category=CATEGORY,
            **newer_fields(["mix", "mix subjects", "blend subjects", "style mixing", "merge subjects"]),
            description="Mixes two, three or four subjects into one: half this dog, half that cat. Move the sliders x "
            "and y, or write your own weights.",
            inputs=[
                BlipSubject.Input("subject_1", tooltip="The subject at x 0. With four subjects: the top left corner."),
                BlipSubject.Input("subject_2", tooltip="The subject at x 1. With four subjects: the top right corner."),
                slider_input(
                    "x",
                    0.5,
                    "0: subject_1. 1: subject_2. 0.5: half of each. Below 0 or above 1, one subject is exaggerated "
                    "and the other taken away: a little (-0.2 or 1.2) can help, more looks strange.",
                    *BEYOND,
                ),
                slider_input(
                    "y",
                    0.0,
                    "Only for three or four subjects. With three, 1 is subject_3. With four, 0 is the side of "
                    "subject_1 and subject_2, and 1 the side of subject_3 and subject_4.",
                    *BEYOND,
                ),
                blend_mode_input(),
                advanced(
                    io.String.Input(
                        "weights",
                        default="",
                        placeholder="1, 2, 0.5",
                        tooltip="Instead of the sliders, one number for each subject, such as 1, 2, 0.5: here the "
                        "second counts twice as much as the first. A negative number takes a subject away. Empty: the "
                        "sliders count.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "word",
                        default="",
                        placeholder="the strongest subject's word",
                        tooltip="The word for the mix in the prompt. Empty: the word of the subject that counts most.",
                    )
                ),
                BlipSubject.Input(
                    "subject_3", optional=True, tooltip="A third subject. With four subjects: the bottom left corner."
                ),
                BlipSubject.Input("subject_4", optional=True, tooltip="A fourth subject: the bottom right corner."),
            ],
            outputs=[
                BlipSubject.Output(
                    display_name="subject", tooltip="The mix. Connect it to Subject Prompt Compose or Save Subject."
                ),
                io.String.Output(display_name="report", tooltip="Text to read: what was mixed, and how much of each."),
            ],
        )

    @classmethod
    def execute(
        cls,
        subject_1: Subject,
        subject_2: Subject,
        x: float,
        y: float,
        mode: BlendMode,
        weights: str,
        word: str,
        subject_3: Subject | None = None,
        subject_4: Subject | None = None,
    ) -> io.NodeOutput:
        """Blend the subjects with the weights, or with those of the sliders."""
        subjects = require_in_order(subject_1, subject_2, subject_3, subject_4)
        chosen = parse_weights(weights) or slider_weights(len(subjects), x, y)
        blended = blend(subjects, chosen, mode, word)
        return io.NodeOutput(blended, describe_blend(subjects, chosen, mode, blended))


class SubjectTrajectory(io.ComfyNode):
    """Blends subjects step by step, into a batch of subjects."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectTrajectory",
            display_name="Subject Trajectory",
            category=CATEGORY,
            **newer_fields(["morph", "morphing", "interpolation steps", "blend sequence"]),
            description="Morphs one subject into another in equal steps, with a picture for each step; or fills a "
            "square between four subjects. One KSampler draws all steps, and Subject Grid puts them on one sheet.",
            inputs=[
                BlipSubject.Input(
                    "subject_1", tooltip="Where the line begins. With four subjects: the top left corner."
                ),
                BlipSubject.Input(
                    "subject_2", tooltip="Where the line ends. With four subjects: the top right corner."
                ),
                io.Int.Input(
                    "steps",
                    default=5,
                    min=2,
                    max=64,
                    tooltip="How many pictures from the first subject to the last, both included. With four subjects "
                    "it is the number along each side of the square: 5 makes 25 pictures.",
                ),
                blend_mode_input(),
                advanced(
                    io.String.Input(
                        "word",
                        default="",
                        placeholder="subject_1's word",
                        tooltip="The word for all steps in the prompt. Empty: the word of subject_1.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "steps_at_once",
                        default=16,
                        min=1,
                        max=4096,
                        tooltip="How many pictures are drawn at the same time. Lower it if your card runs out of "
                        "memory. The pictures stay the same.",
                    )
                ),
                BlipSubject.Input("subject_3", optional=True, tooltip="The bottom left corner of a square of four."),
                BlipSubject.Input("subject_4", optional=True, tooltip="The bottom right corner of a square of four."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="One Empty Latent Image, or a picture from VAE Encode. It is repeated for every step with "
                    "the same noise, so that only the subject changes from picture to picture.",
                ),
            ],
            outputs=[
                BlipSubject.Output(
                    display_name="subject",
                    is_output_list=True,
                    tooltip="All steps. Connect it to Subject Prompt Compose.",
                ),
                io.Latent.Output(
                    display_name="latent",
                    is_output_list=True,
                    tooltip="Connect it to latent_image of KSampler. It is empty if nothing is connected to the input "
                    "latent.",
                ),
                io.String.Output(
                    display_name="labels",
                    tooltip="Where each step lies, such as x 0.25. Connect it to labels of Subject Grid.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        subject_1: Subject,
        subject_2: Subject,
        steps: int,
        mode: BlendMode,
        word: str,
        steps_at_once: int,
        subject_3: Subject | None = None,
        subject_4: Subject | None = None,
        latent: Latent | None = None,
    ) -> io.NodeOutput:
        """Blend the subjects step by step, and repeat the latent for each batch of steps."""
        subjects = require_in_order(subject_1, subject_2, subject_3, subject_4)
        # The host runs the following nodes once for each batch of a list, so that the whole need not fit into memory.
        batches = split_rows(trajectory(subjects, steps, mode, word), steps_at_once)
        latents = repeat_for_batches(latent, [len(batch) for batch in batches])
        return io.NodeOutput(batches, latents, "\n".join(trajectory_labels(len(subjects), steps)))


class SubjectGrid(io.ComfyNode):
    """Lays images out on one sheet; the batches of a trajectory arrive as a list and are laid out together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectGrid",
            display_name="Subject Grid",
            category=CATEGORY,
            **newer_fields(["contact sheet", "image grid", "xy plot", "labels"]),
            description="Puts the pictures of Subject Trajectory on one sheet. The pictures that the subjects were "
            "made from stand at the ends or in the corners.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures, from VAE Decode, in the order of Subject Trajectory."),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many pictures stand side by side; source pictures do not count. 0: chosen for you, "
                    "one row for a line with source pictures, otherwise a square.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    tooltip="The words below the pictures: one line for each picture, then one for each source "
                    "picture. Connect labels of Subject Trajectory, or write your own. Empty: no words.",
                ),
                advanced(
                    io.Int.Input(
                        "longest_side",
                        default=8192,
                        min=64,
                        max=16384,
                        tooltip="The longest side of the sheet, in pixels. A sheet that would be longer is made "
                        "smaller.",
                    )
                ),
                io.Image.Input(
                    "source_1", optional=True, tooltip="The picture of subject_1: left of a line, top left of a square."
                ),
                io.Image.Input(
                    "source_2",
                    optional=True,
                    tooltip="The picture of subject_2: right of a line, top right of a square.",
                ),
                io.Image.Input("source_3", optional=True, tooltip="The picture of subject_3: bottom left of a square."),
                io.Image.Input(
                    "source_4", optional=True, tooltip="The picture of subject_4: bottom right of a square."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The sheet. Connect it to Save Image.")],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        columns: list[int],
        labels: list[str],
        longest_side: list[int],
        source_1: list[Tensor] | None = None,
        source_2: list[Tensor] | None = None,
        source_3: list[Tensor] | None = None,
        source_4: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        """Lay all batches of images out on one sheet."""
        sources = [source[0] if source else None for source in (source_1, source_2, source_3, source_4)]
        lines = labels[0].splitlines()
        return io.NodeOutput(contact_sheet(images, sources, columns[0], lines, longest_side[0]))


NODES = [SubjectInterpolate, SubjectTrajectory, SubjectGrid]
