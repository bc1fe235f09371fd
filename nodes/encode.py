"""BLIP-2 Subject Encode."""

from __future__ import annotations

from torch import Tensor

from ..blip_qformer.encoder import PREPROCESSING_MODES
from ..blip_qformer.encoder.preprocessing import PreprocessingMode
from ..blip_qformer.subject.views import average_views, describe_views
from ..blip_qformer.subject.weights import parse_weights
from .host.lists import takes_lists
from .host.managed import ManagedEncoder, encode_views
from .types import CATEGORY, Blip2QFormer, BlipSubject, advanced, io, newer_fields


class SubjectEncode(io.ComfyNode):
    """Encodes images of a thing as a subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectEncode",
            display_name="BLIP-2 Subject Encode",
            category=CATEGORY,
            **newer_fields(
                [
                    "subject",
                    "encode subject",
                    "image prompt",
                    "reference image",
                    "ip-adapter",
                    "ipadapter",
                    "face swap",
                ],
                CATEGORY,
            ),
            description="Looks at a picture and remembers one thing in it: your dog, your mug. Connect the result to "
            "Subject Prompt Compose, and your prompt draws that thing. It works well with things and animals, but not "
            "with faces of people.",
            inputs=[
                Blip2QFormer.Input(
                    "qformer",
                    tooltip="The part of the model that looks at pictures. Connect qformer of Load BLIP-Diffusion or "
                    "of Load BLIP-2 Q-Former.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="A picture of the thing. Large, whole and in the middle works best. Several pictures (a "
                    "batch or a list, of any sizes) work too: see average_batch.",
                ),
                io.String.Input(
                    "subject_word",
                    default="dog",
                    tooltip="The thing to look at, in one to three English words: dog, teddy bear, teapot. The word "
                    "decides what is remembered.",
                ),
                io.Boolean.Input(
                    "average_batch",
                    default=True,
                    label_on="one subject",
                    label_off="one each",
                    tooltip="Only for several pictures. one subject: all of them show the same thing. one each: every "
                    "picture is a subject of its own.",
                ),
                advanced(
                    io.Combo.Input(
                        "preprocessing",
                        options=list(PREPROCESSING_MODES),
                        default=PREPROCESSING_MODES[0],
                        tooltip="How a picture that is not square becomes square. crop: keeps the middle, as the "
                        "authors do. squash: presses all of it into the square, as diffusers does. pad: keeps all of "
                        "it and adds white. Use pad if your thing is cut off.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the thing is. Everything else becomes white, and the thing fills the "
                    "picture. Use it if the thing is small or if other things stand around it. For the mask of a Load "
                    "Image with a transparent picture, put Invert Mask between.",
                ),
                advanced(
                    io.String.Input(
                        "view_weights",
                        default="",
                        optional=True,
                        placeholder="1, 1, 0.5",
                        tooltip="How much each of several pictures counts for one subject, such as 1, 1, 0.5. Give a "
                        "poor picture a smaller number. Empty: all count the same.",
                    )
                ),
            ],
            outputs=[
                BlipSubject.Output(display_name="subject", tooltip="Your thing. Connect it to Subject Prompt Compose."),
                io.String.Output(
                    display_name="report",
                    tooltip="Text to read: how many pictures were used; with three or more, also which one is least "
                    "like the others.",
                ),
            ],
            is_input_list=True,
        )

    @classmethod
    @takes_lists("image", "mask")
    def execute(
        cls,
        qformer: ManagedEncoder,
        image: list[Tensor],
        subject_word: str,
        average_batch: bool,
        preprocessing: PreprocessingMode,
        mask: list[Tensor] | None = None,
        view_weights: str = "",
    ) -> io.NodeOutput:
        """Encode the images, and average them unless each is a subject of its own."""
        views = encode_views(qformer, image, subject_word, preprocessing, mask)
        if not average_batch:
            return io.NodeOutput(views, f'{len(views)} x "{views.word}", one for each picture.')
        return io.NodeOutput(average_views(views, parse_weights(view_weights)), describe_views(views))


NODES = [SubjectEncode]
