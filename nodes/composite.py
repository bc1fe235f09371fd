"""Subject on Background."""

from __future__ import annotations

from collections.abc import Iterator

import comfy.model_management
import comfy.utils
import torch
from einops import rearrange
from torch import Tensor

from ..blip_qformer.encoder.preprocessing import composite_alpha, fit_mask
from ..blip_qformer.imaging.compositing import Placement, composite
from ..blip_qformer.imaging.masks import blur_mask, check_mask
from ..blip_qformer.imaging.matting import THRESHOLDS, make_trimap, matte
from ..blip_qformer.imaging.resizing import center_crop
from .host.managed import ManagedSegmenter
from .host.model_paths import list_segmentation_models, segmentation_model_path
from .types import CATEGORY, advanced, io

OUTPUT_SIZES = ("background", "picture")


class SubjectOnBackground(io.ComfyNode):
    """A picture's subject is cut out and put onto another picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        lower, upper = THRESHOLDS
        return io.Schema(
            node_id="BLIPDiffusionSubjectOnBackground",
            display_name="Subject on Background",
            category=CATEGORY,
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
                        options=list_segmentation_models(),
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
                    "Image with a transparent picture needs an Invert Mask first.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The subject on the background."),
                io.Mask.Output(display_name="mask", tooltip="White where the subject is in the new picture."),
            ],
        )

    @classmethod
    def validate_inputs(cls, segmentation_model: str | None) -> bool:
        return True  # a graph with a mask runs on a machine that has no CLIPSeg, or another one

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
        pictures = colours(image)
        backgrounds = colours(background).to(pictures.device)
        count = joint_length(len(pictures), len(backgrounds))
        if mask is not None:
            subjects = subjects_by_mask(pictures, mask, soften_edge)
        else:
            model = ManagedSegmenter(segmentation_model_path(segmentation_model))
            thresholds = background_below, subject_above
            subjects = subjects_by_word(pictures, subject_word, model, thresholds, matting_size)
        if output_size == "picture":
            backgrounds = torch.stack([center_crop(each, *pictures.shape[1:3]) for each in backgrounds])

        progress = comfy.utils.ProgressBar(count)
        placed = []
        for number in range(count):
            if number < len(pictures):
                foreground, alpha = next(subjects)
            placed.append(composite(foreground, alpha, backgrounds[number % len(backgrounds)], Placement(scale, x, y)))
            progress.update(1)
        images, masks = (torch.stack(each) for each in zip(*placed, strict=True))
        return io.NodeOutput(images, masks)


def colours(images: Tensor) -> Tensor:
    """[B, H, W, 3]; what is transparent in a picture becomes white."""
    return rearrange(composite_alpha(images), "b c h w -> b h w c")


def joint_length(pictures: int, backgrounds: int) -> int:
    """How many pictures come out.

    Raises:
        ValueError: there are several of both, and not as many of one as of the other.
    """
    if pictures != backgrounds and 1 not in (pictures, backgrounds):
        raise ValueError(
            f"There are {pictures} pictures and {backgrounds} backgrounds: give as many of one as of the other, or a "
            "single one of either."
        )
    return max(pictures, backgrounds)


def subjects_by_mask(pictures: Tensor, mask: Tensor, softening: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Each picture [H, W, 3] with its mask [H, W] as the subject's opacity.

    Raises:
        ValueError: a mask does not fit, or marks no subject.
    """
    for each in mask.reshape(-1, *mask.shape[-2:]):
        check_mask(each)
    for picture, alpha in zip(pictures, fit_mask(mask, pictures), strict=True):
        yield picture, blur_mask(alpha, softening)


def subjects_by_word(
    pictures: Tensor, word: str, segment: ManagedSegmenter, thresholds: tuple[float, float], longest_side: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The subject's colours [H, W, 3] and opacity [H, W] in each picture; can be cancelled.

    Raises:
        ValueError: the word is empty, there is no such subject, or pymatting is missing.
    """
    if not word.strip():
        raise ValueError("The subject word is empty: write what is to be cut out, such as dog, or connect a mask.")
    for picture in pictures:
        comfy.model_management.throw_exception_if_processing_interrupted()
        trimap = make_trimap(segment(picture, word.strip()), thresholds)
        on_step = comfy.model_management.throw_exception_if_processing_interrupted
        alpha, foreground = matte(picture, trimap, longest_side, on_step)
        yield foreground, alpha


NODES = [SubjectOnBackground]
