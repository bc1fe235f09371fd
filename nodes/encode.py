"""BLIP-2 Subject Encode."""

from __future__ import annotations

from torch import Tensor

from ..blip_qformer.encoder import PREPROCESSING_MODES
from ..blip_qformer.encoder.preprocessing import PreprocessingMode
from ..blip_qformer.subject import Subject
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
            **newer_fields(["image prompt", "reference image", "ip-adapter", "personalization"], CATEGORY),
            description="Looks at a picture and keeps what belongs to the thing you name. The result sits in a prompt "
            "like words: connect it to Subject Prompt Compose.",
            inputs=[
                Blip2QFormer.Input("qformer", tooltip="From Load BLIP-Diffusion or Load BLIP-2 Q-Former."),
                io.Image.Input(
                    "image",
                    tooltip="One picture of the thing, or a batch or list, of any sizes: several views of it, or "
                    "several things.",
                ),
                io.String.Input(
                    "subject_word",
                    default="dog",
                    tooltip="What to look at in the picture, in one to three English words: dog, teddy bear, teapot.",
                ),
                io.Boolean.Input(
                    "average_batch",
                    default=True,
                    label_on="one subject",
                    label_off="one each",
                    tooltip="For a batch of pictures: one subject seen from several sides, or one subject for each "
                    "picture.",
                ),
                advanced(
                    io.Combo.Input(
                        "preprocessing",
                        options=list(PREPROCESSING_MODES),
                        default=PREPROCESSING_MODES[0],
                        tooltip="How a picture that is not square becomes square. crop: the middle, as the authors do. "
                        "squash: all of it, pressed together, as diffusers does. pad: all of it, on white.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is: it is cut out, put on white and fills the picture. The mask "
                    "of a Load Image with a transparent picture needs an Invert Mask first.",
                ),
                advanced(
                    io.String.Input(
                        "view_weights",
                        default="",
                        optional=True,
                        placeholder="1, 1, 0.5",
                        tooltip="How much each picture of a batch counts for one subject, such as 1, 1, 0.5. Empty: "
                        "all the same.",
                    )
                ),
            ],
            outputs=[
                BlipSubject.Output(display_name="subject", tooltip="For Subject Prompt Compose."),
                io.String.Output(
                    display_name="report",
                    tooltip="From how many pictures, and of three and more the one least like the others.",
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
        vectors, source = encode_views(qformer, image, subject_word, preprocessing, mask)
        views = Subject(vectors, subject_word.strip(), qformer.encoder_hash, source)
        if not average_batch:
            return io.NodeOutput(views, f'{len(views)} x "{views.word}", one for each picture.')
        return io.NodeOutput(average_views(views, parse_weights(view_weights)), describe_views(views))


NODES = [SubjectEncode]
