"""Subject on Background."""

from __future__ import annotations

from torch import Tensor

from ..blip_qformer.imaging.compositing import Placement
from ..blip_qformer.imaging.matting import THRESHOLDS
from .host.composite import composite_batch, cut_out_by_mask, cut_out_by_word, drop_alpha
from .host.lists import drop_blank_mask
from .host.managed import ManagedSegmenter
from .host.model_paths import SEGMENTATION_MODELS
from .types import CATEGORY, advanced, io, newer_fields

OUTPUT_SIZES = ("background", "picture")


class SubjectOnBackground(io.ComfyNode):
    """Cuts subjects out of images and puts them onto backgrounds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        lower, upper = THRESHOLDS
        return io.Schema(
            node_id="BLIPDiffusionSubjectOnBackground",
            display_name="Subject on Background",
            category=CATEGORY,
            **newer_fields(["remove background", "cut out", "matting", "composite"]),
            description="Cuts a subject out, by a mask or by its name, and puts it onto another picture: where it was, "
            "or larger, smaller and moved. For an img2img or inpainting start, or to free a subject of its background.",
            inputs=[
                io.Image.Input("image", tooltip="The picture with the subject, or a batch of them."),
                io.Image.Input("background", tooltip="What to put it on: one picture for all, or one for each."),
                io.String.Input(
                    "subject_word",
                    default="dog",
                    tooltip="What to cut out, in a word or two. With a mask connected it is not used.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.01,
                    max=4.0,
                    step=0.01,
                    tooltip="1: the picture is as large as fits into the new one. 2: twice that.",
                ),
                io.Float.Input(
                    "x",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Moves the subject to the right, in parts of the new picture's width. 0: where it was.",
                ),
                io.Float.Input(
                    "y",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Moves the subject down, in parts of the new picture's height. 0: where it was.",
                ),
                advanced(
                    io.Combo.Input(
                        "output_size",
                        options=list(OUTPUT_SIZES),
                        default=OUTPUT_SIZES[0],
                        tooltip="Which of the two gives the new picture its size. picture: the middle of the "
                        "background is made to fill it.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "soften_edge",
                        default=0.0,
                        min=0.0,
                        max=100.0,
                        step=0.5,
                        tooltip="Blurs a connected mask by so many pixels, so that its edge melts into the background. "
                        "0: the mask as it is.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "segmentation_model",
                        options=SEGMENTATION_MODELS.options(),
                        tooltip="A CLIPSeg folder in models/clipseg, which finds the subject by its name where no mask "
                        "is connected.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "background_below",
                        default=lower,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Without a mask: what is the subject with at most this probability is cut away. Raise "
                        "it if too much stays.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "subject_above",
                        default=upper,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Without a mask: what is the subject with at least this probability stays whole. Lower "
                        "it if parts are missing. Between the two, the edge is found by matting.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "matting_size",
                        default=1024,
                        min=64,
                        max=4096,
                        tooltip="Without a mask: the longer side, in pixels, at which the edge is found. Larger is "
                        "finer and takes longer.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is; grey is half transparent. Needs no model. The mask of a Load "
                    "Image with a transparent picture needs an Invert Mask first; without transparency it says nothing "
                    "and is ignored.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The subject on the background."),
                io.Mask.Output(display_name="mask", tooltip="White where the subject is in the new picture."),
            ],
        )

    @classmethod
    def validate_inputs(cls, segmentation_model: str | None) -> bool:
        """Accept any model: a graph with a mask runs on a machine that has no CLIPSeg, or another one."""
        return True

    @classmethod
    def execute(
        cls,
        image: Tensor,
        background: Tensor,
        subject_word: str,
        scale: float,
        x: float,
        y: float,
        output_size: str,
        soften_edge: float,
        segmentation_model: str,
        background_below: float,
        subject_above: float,
        matting_size: int,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        """Cut the subjects out, by mask or by word, and put them onto the backgrounds."""
        images = drop_alpha(image)
        marking = None if mask is None else drop_blank_mask(mask)
        if marking is not None:
            cut_outs = cut_out_by_mask(images, marking, soften_edge)
        else:
            if mask is not None:
                _require_without_mask(segmentation_model)
            segmenter = ManagedSegmenter(SEGMENTATION_MODELS.path(segmentation_model))
            thresholds = background_below, subject_above
            cut_outs = cut_out_by_word(images, subject_word, segmenter, thresholds, matting_size)
        placement = Placement(scale, x, y)
        return io.NodeOutput(*composite_batch(images, cut_outs, background, placement, output_size == "picture"))


def _require_without_mask(segmentation_model: str) -> None:
    """Say that a connected mask is none, where no model could do without.

    Args:
        segmentation_model: Entry of the drop-down list.

    Raises:
        ValueError: There is no such model.
    """
    if segmentation_model not in SEGMENTATION_MODELS.find():
        raise ValueError(
            "The mask says nothing, because its picture has no transparency: disconnect it, and connect one that is "
            "white where the subject is. Without it, a model has to find the subject. "
            f"{SEGMENTATION_MODELS.missing(segmentation_model)}"
        )


NODES = [SubjectOnBackground]
