"""Subject Regions."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from ..blip_qformer.attention.region_sheet import region_sheet
from ..blip_qformer.attention.region_text import parse_boxes, parse_numbers
from ..blip_qformer.attention.schedule import StepRange
from .host.attention.hooks import model_for_edits
from .host.attention.lost_edits import require_edits_kept
from .host.attention.regional_conditioning import add_regions
from .host.conditioning import Conditioning
from .types import CATEGORY, advanced, fraction_input, io, model_input, model_output, newer_fields, slider_input

InputT = TypeVar("InputT")

REGIONS = 4  # of one node; further ones come from a second node behind it
PREVIEW = 512  # pixels of the preview's edges where no mask says what shape the picture has


def region_input(number: int) -> io.Conditioning.Input:
    """Return the input of one region's prompt; all but the first are optional."""
    return io.Conditioning.Input(
        f"region_{number}",
        optional=number > 1,
        tooltip=f"What is in region {number}: from Subject Prompt Compose, or any prompt.",
    )


def mask_input(number: int) -> io.Mask.Input:
    """Return the optional input of one region's mask."""
    return io.Mask.Input(
        f"mask_{number}",
        optional=True,
        tooltip=f"White where region {number} is. It is used instead of line {number} of boxes. Any size; for a "
        "batch of pictures, one mask for each works too.",
    )


class SubjectRegions(io.ComfyNode):
    """Gives regions of the picture prompts of their own, in one call of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectRegions",
            display_name="Subject Regions",
            category=CATEGORY,
            **newer_fields(["regional prompt", "several subjects", "two subjects", "attention couple", "area"]),
            description="Puts several subjects into one picture, each where you want it, in one run of the sampler. "
            "Put it between the prompts and the sampler. For more than four regions, connect conditioning to scene of "
            "a second Subject Regions.",
            inputs=[
                io.Conditioning.Input(
                    "scene",
                    tooltip="The prompt of the whole picture, without the subjects: a table in a garden. It counts "
                    "where no region is.",
                ),
                region_input(1),
                io.String.Input(
                    "boxes",
                    default="0, 0, 0.5, 1\n0.5, 0, 0.5, 1",
                    multiline=True,
                    tooltip="Where the regions are, one line each: x, y, width, height, all from 0 to 1. 0, 0, 0.5, 1 "
                    "is the left half of the picture. The line of a region with a mask is not read and can stay "
                    "empty.",
                ),
                io.String.Input(
                    "strengths",
                    default="1",
                    tooltip="How strong the regions are. 1: normal. Below 1 the scene shows through. Where regions "
                    "overlap, the stronger one gets more. One number for all, or one for each with commas between "
                    "them.",
                ),
                io.String.Input(
                    "feathers",
                    default="0.1",
                    tooltip="How wide the soft edge of a region is. 0: a hard edge. 0.1: a tenth of the picture's "
                    "shorter side. One number for all, or one for each with commas between them.",
                ),
                slider_input(
                    "base_share",
                    0.2,
                    "How much every region also follows the scene. 0: not at all. Higher: the subjects fit together "
                    "better in one picture, but each is less like itself.",
                    0.0,
                    1.0,
                ),
                advanced(
                    fraction_input(
                        "start",
                        0.0,
                        "When the regions begin to count. 0: at the first step. Before that, only the scene counts.",
                    )
                ),
                advanced(
                    fraction_input(
                        "end",
                        1.0,
                        "When the regions stop counting. 1: after the last step. The first steps decide where things "
                        "are, the last steps decide the details.",
                    )
                ),
                mask_input(1),
                *(make(number) for number in range(2, REGIONS + 1) for make in (region_input, mask_input)),
                model_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The finished prompt. Connect it to positive of the sampler, or to ControlNet and area "
                    "nodes before it.",
                ),
                io.Image.Output(
                    display_name="layout",
                    tooltip="A picture of the regions in colours, with the words of their subjects. Connect it to "
                    "Preview Image to check them.",
                ),
                model_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        scene: Conditioning,
        region_1: Conditioning,
        boxes: str,
        strengths: str,
        feathers: str,
        base_share: float,
        start: float,
        end: float,
        mask_1: Tensor | None = None,
        region_2: Conditioning | None = None,
        mask_2: Tensor | None = None,
        region_3: Conditioning | None = None,
        mask_3: Tensor | None = None,
        region_4: Conditioning | None = None,
        mask_4: Tensor | None = None,
        model: io.Model.Type | None = None,
    ) -> io.NodeOutput:
        """Return the scene with its regions, their layout, and the model that samples it without a hook."""
        prompts = _connected(region_1, region_2, region_3, region_4)
        masks = _connected(mask_1, mask_2, mask_3, mask_4)
        count = max(prompts)
        conditioning, regions = add_regions(
            scene,
            prompts,
            masks,
            parse_boxes(boxes),
            parse_numbers(strengths, "strengths", count),
            parse_numbers(feathers, "feathers", count),
            base_share,
            StepRange(start, end),
            in_model=model is not None,
        )
        require_edits_kept(cls.hidden, scene, conditioning)
        height, width = next(iter(masks.values())).shape[-2:] if masks else (PREVIEW, PREVIEW)
        return io.NodeOutput(conditioning, region_sheet(regions, height, width), model_for_edits(model))


def _connected(*inputs: InputT | None) -> dict[int, InputT]:
    """Those of the inputs that are connected, by their numbers from 1 on."""
    return {number: value for number, value in enumerate(inputs, start=1) if value is not None}


NODES = [SubjectRegions]
