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
            **newer_fields(["cut out", "cutout", "remove background", "matting", "composite", "paste"]),
            description="Cuts a thing out of its picture and puts it on another one: where it was, or larger, smaller "
            "and moved. Use it to begin an img2img or inpainting, or to get rid of a background. It cuts by a mask; "
            "to cut by a word, it needs a CLIPSeg model and pymatting (see the help page).",
            inputs=[
                io.Image.Input("image", tooltip="The picture with the thing, or a batch of them."),
                io.Image.Input("background", tooltip="The picture to put it on: one for all, or one for each."),
                io.String.Input(
                    "subject_word",
                    default="dog",
                    tooltip="What to cut out, in one or two English words. Not used if a mask is connected.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.01,
                    max=4.0,
                    step=0.01,
                    tooltip="How large the picture is put on the new one. 1: as large as fits. 0.5: half of that. 2: "
                    "twice that.",
                ),
                io.Float.Input(
                    "x",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Moves the thing to the right; below 0 to the left. 0: where it was. 0.5: by half of the "
                    "new picture's width.",
                ),
                io.Float.Input(
                    "y",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Moves the thing down; below 0 up. 0: where it was. 0.5: by half of the new picture's "
                    "height.",
                ),
                advanced(
                    io.Combo.Input(
                        "output_size",
                        options=list(OUTPUT_SIZES),
                        default=OUTPUT_SIZES[0],
                        tooltip="How large the new picture is. background: as large as background. picture: as large "
                        "as image; the middle of the background fills it.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "soften_edge",
                        default=0.0,
                        min=0.0,
                        max=100.0,
                        step=0.5,
                        tooltip="Makes the edge of your mask soft, by so many pixels. 0: as it is. Try 1 or 2 if a "
                        "thin line of the old background stays.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "segmentation_model",
                        options=SEGMENTATION_MODELS.options(),
                        tooltip="Only without a mask: the CLIPSeg model that finds the thing by its word, a folder in "
                        "models/clipseg.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "background_below",
                        default=lower,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Only without a mask: how sure it must be that a pixel is the thing, from 0 to 1. "
                        "Pixels up to this value are cut away. Raise it if too much stays.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "subject_above",
                        default=upper,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Only without a mask: pixels from this value on stay whole. Lower it if pieces of the "
                        "thing are missing. Between the two values the edge is found.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "matting_size",
                        default=1024,
                        min=64,
                        max=4096,
                        tooltip="Only without a mask: how finely the edge is found, as the longer side in pixels. "
                        "Larger is finer and slower.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the thing is, grey where it is half transparent. With a mask no model is "
                    "needed. For the mask of a Load Image with a transparent picture, put Invert Mask between. The "
                    "mask of a picture without transparency is ignored.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The thing on the background."),
                io.Mask.Output(display_name="mask", tooltip="White where the thing is in the new picture."),
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
