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
            **newer_fields(["blend subjects", "mix subjects", "style mixing"]),
            description="Mixes two, three or four subjects into one: a slider between two, a square between four, or "
            "weights of your own.",
            inputs=[
                BlipSubject.Input("subject_1", tooltip="The subject at x 0; of four, the top left."),
                BlipSubject.Input("subject_2", tooltip="The subject at x 1; of four, the top right."),
                slider_input(
                    "x",
                    0.5,
                    "0: subject_1, 1: subject_2, between: a mix. Below 0 and above 1 lies what is beyond them "
                    "(extrapolation): exaggerated, and soon strange.",
                    *BEYOND,
                ),
                slider_input(
                    "y",
                    0.0,
                    "0: between subject_1 and subject_2. 1: subject_3, or with four between subject_3 and subject_4. "
                    "With two subjects it does nothing.",
                    *BEYOND,
                ),
                blend_mode_input(),
                advanced(
                    io.String.Input(
                        "weights",
                        default="",
                        placeholder="1, 2, 0.5",
                        tooltip="A number for each subject instead of the sliders, such as 1, 2, 0.5. Only their "
                        "proportion matters. A negative one takes a subject away (extrapolation). Empty: the sliders.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "word",
                        default="",
                        placeholder="the strongest subject's word",
                        tooltip="The word for the mix. Empty: that of the subject with the largest weight.",
                    )
                ),
                BlipSubject.Input("subject_3", optional=True, tooltip="A third subject; of four, the bottom left."),
                BlipSubject.Input("subject_4", optional=True, tooltip="A fourth subject, the bottom right."),
            ],
            outputs=[
                BlipSubject.Output(display_name="subject", tooltip="For Subject Prompt Compose or Save Subject."),
                io.String.Output(display_name="report", tooltip="What was mixed, with which weights."),
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
            **newer_fields(["morph", "interpolation steps", "blend sequence"]),
            description="Goes from one subject to another in equal steps, or fills the square between four. One "
            "KSampler draws all steps, and Subject Grid lays them out.",
            inputs=[
                BlipSubject.Input("subject_1", tooltip="Where the line begins; of four, the top left."),
                BlipSubject.Input("subject_2", tooltip="Where the line ends; of four, the top right."),
                io.Int.Input(
                    "steps",
                    default=5,
                    min=2,
                    max=64,
                    tooltip="How many subjects along the line, both ends included. With four subjects, along each "
                    "side of the square: 5 makes 25 pictures.",
                ),
                blend_mode_input(),
                advanced(
                    io.String.Input(
                        "word",
                        default="",
                        placeholder="subject_1's word",
                        tooltip="The word for all steps. Empty: that of subject_1.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "steps_at_once",
                        default=16,
                        min=1,
                        max=4096,
                        tooltip="How many pictures are drawn at the same time; the rest follows. Lower it if memory "
                        "runs out: the pictures stay the same.",
                    )
                ),
                BlipSubject.Input("subject_3", optional=True, tooltip="The bottom left of a square of four."),
                BlipSubject.Input("subject_4", optional=True, tooltip="The bottom right of a square of four."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="One Empty Latent Image (or an encoded picture): it comes out once for each step, with "
                    "the same noise for all, so that only the subject changes from picture to picture.",
                ),
            ],
            outputs=[
                BlipSubject.Output(
                    display_name="subject", is_output_list=True, tooltip="All steps, for Subject Prompt Compose."
                ),
                io.Latent.Output(
                    display_name="latent",
                    is_output_list=True,
                    tooltip="For KSampler's latent_image; needs the input latent.",
                ),
                io.String.Output(display_name="labels", tooltip="Where each step lies, for Subject Grid's labels."),
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
            **newer_fields(["contact sheet", "image grid", "xy plot"]),
            description="Lays the pictures of a trajectory out on one sheet, the pictures the subjects were made from "
            "at its ends or corners.",
            inputs=[
                io.Image.Input("images", tooltip="What was drawn, as a batch in the trajectory's order."),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Pictures in a row, without sources. 0: one row for a line with sources, else a square.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    tooltip="One line for each picture, then one for each source. Connect Subject Trajectory's labels, "
                    "or write your own. Empty: no labels.",
                ),
                advanced(
                    io.Int.Input(
                        "longest_side",
                        default=8192,
                        min=64,
                        max=16384,
                        tooltip="A sheet that would be longer than this, in pixels, is drawn smaller.",
                    )
                ),
                io.Image.Input(
                    "source_1", optional=True, tooltip="subject_1's picture: left of a line, top left of a square."
                ),
                io.Image.Input(
                    "source_2", optional=True, tooltip="subject_2's picture: right of a line, top right of a square."
                ),
                io.Image.Input("source_3", optional=True, tooltip="subject_3's picture: bottom left of a square."),
                io.Image.Input("source_4", optional=True, tooltip="subject_4's picture: bottom right of a square."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The sheet, for Save Image.")],
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
