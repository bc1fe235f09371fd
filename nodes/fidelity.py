"""Subject Fidelity."""

from __future__ import annotations

import logging

from torch import Tensor

from ..blip_qformer.encoder import PREPROCESSING_MODES
from ..blip_qformer.encoder.preprocessing import PreprocessingMode
from ..blip_qformer.imaging.contact_sheet import contact_sheet
from ..blip_qformer.subject import Subject
from ..blip_qformer.subject.provenance import encoder_mismatch
from .host.fidelity import measure_fidelity, pick
from .host.lists import takes_lists
from .host.managed import ManagedEncoder
from .types import CATEGORY, Blip2QFormer, BlipSubject, advanced, io, newer_fields

logger = logging.getLogger("blip_diffusion")


class SubjectFidelity(io.ComfyNode):
    """Compares images with a subject and picks the best."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectFidelity",
            display_name="Subject Fidelity",
            category=CATEGORY,
            **newer_fields(["pick best picture", "best of batch", "similarity score", "rank pictures", "compare"]),
            description="Compares pictures with your subject, gives each a score and picks the most similar one. Draw "
            "many pictures, then keep the best. It helps you choose; it is not always right: look at the sheet too.",
            inputs=[
                Blip2QFormer.Input("qformer", tooltip="From the loader that also made the subject."),
                io.Image.Input(
                    "images", tooltip="The pictures to compare: a batch or a list. They can have different sizes."
                ),
                BlipSubject.Input(
                    "subject",
                    tooltip="The subject that you drew with. One for all pictures, or one for each picture, as Subject "
                    "Trajectory gives them.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="Leave it empty to compare with the subject only. Write the prompt here (without the "
                    "subject) and connect without_subject: then a picture must also fit the prompt.",
                ),
                advanced(
                    io.Combo.Input(
                        "preprocessing",
                        options=list(PREPROCESSING_MODES),
                        default=PREPROCESSING_MODES[0],
                        tooltip="How a picture that is not square becomes square. crop: keeps the middle. squash: "
                        "keeps all of it, pressed together. pad: keeps all of it, on white. Use what you used in "
                        "BLIP-2 Subject Encode.",
                    )
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="Real pictures of your thing. If connected, the pictures are compared with these and not "
                    "with the subject. Use it for a tuned subject.",
                ),
                io.Image.Input(
                    "without_subject",
                    optional=True,
                    tooltip="A picture drawn from the prompt without the subject (subject_strength 0). Only needed "
                    "if prompt has text.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="best", tooltip="The picture with the highest score."),
                io.Image.Output(display_name="sheet", tooltip="All pictures, each with its score below."),
                io.String.Output(display_name="report", tooltip="All scores as text, for Preview as Text."),
                io.Int.Output(
                    display_name="index",
                    tooltip="Which picture is best, counted from 0: for batch_index of Latent From Batch.",
                ),
            ],
            is_input_list=True,
        )

    @classmethod
    @takes_lists("images", "subject", "reference", "without_subject")
    def execute(
        cls,
        qformer: ManagedEncoder,
        images: list[Tensor],
        subject: list[Subject],
        prompt: str,
        preprocessing: PreprocessingMode,
        reference: list[Tensor] | None = None,
        without_subject: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        """Score the images, and lay them out with their scores."""
        prompt = prompt.strip()
        scores = measure_fidelity(qformer, images, subject, preprocessing, reference, prompt, without_subject)
        warning = encoder_mismatch(subject[0], qformer.encoder_hash) if reference is None else ""
        if warning:
            logger.warning(warning)
        report = f"{scores.describe(subject[0].word)}\n{warning}".strip()
        sheet = contact_sheet(images, labels=scores.labels())
        return io.NodeOutput(pick(images, scores.best), sheet, report, scores.best)


NODES = [SubjectFidelity]
