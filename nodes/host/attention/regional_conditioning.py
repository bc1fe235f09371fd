"""Subject Regions on a conditioning: prompts of regions become edits of the scene's prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....blip_qformer.attention.edits import Box, PromptToPrompt, Region
from ....blip_qformer.attention.edits import regions_of as regions_of_edits
from ....blip_qformer.attention.schedule import StepRange
from ....blip_qformer.prompt import TokenSpan
from ..conditioning import TOKEN_SPANS, Conditioning
from .hooks import EDITS, get_edits, set_edits
from .recorder import RECORDED_PROMPTS

OWN_PREFIX = "blip_"  # of the keys and hooks that nodes of this pack put into a conditioning
HARMLESS = {"pooled_output", "hooks", "model_conds"}  # keys of a conditioning's dictionary that say nothing of a region


def add_regions(
    scene: Conditioning,
    prompts: Mapping[int, Conditioning],
    masks: Mapping[int, Tensor],
    boxes: Sequence[Box | None],
    strengths: Sequence[float],
    feathers: Sequence[float],
    base_share: float,
    steps: StepRange,
    *,
    in_model: bool = False,
) -> tuple[Conditioning, list[Region]]:
    """Give regions of the image prompts of their own.

    Args:
        scene: Conditioning of the whole image, perhaps with regions already.
        prompts: Conditioning of each region by its number from 1 on, of one entry or of as many as the scene has.
        masks: Masks of some of the regions, of shape [B or 1, H, W] in 0..1.
        boxes: Boxes of the regions from number 1 on, for those without a mask.
        strengths: Factor on the mask of each region from number 1 on.
        feathers: Width of each region's soft edge, as a fraction of the image's shorter edge.
        base_share: Share of every region's weight that is left to the scene.
        steps: Steps in which the regions apply.
        in_model: Whether the sampler gets a MODEL that knows of edits.

    Returns:
        The scene's conditioning with regions; the same if they do nothing, and the prompt of a region that covers
        everything in the scene's place. Then the regions, those that the scene had first.

    Raises:
        ValueError: If a region is nowhere, or its conditioning does not fit or has what cannot be kept.
    """
    require_scene(scene)
    for number, prompt in prompts.items():
        require_region(prompt, scene, f"region_{number}")
    places = {number: _mask_or_box(masks.get(number), boxes, number) for number in prompts}
    added = [
        [
            _region(
                prompt[index if len(prompt) > 1 else 0],
                places[number],
                strengths[number - 1],
                feathers[number - 1],
                base_share,
                steps,
            )
            for number, prompt in prompts.items()
        ]
        for index in range(len(scene))
    ]
    regions = regions_of(scene) + added[0]
    effective = [[region for region in each if not region.is_neutral] for each in added]
    if not any(effective):
        return scene, regions
    if len(regions) == 1 and regions[0].covers_everything:
        return _replace_prompt(scene, [each[0] for each in added], in_model=in_model), regions
    edits = [(*own, *each) for own, each in zip(get_edits(scene), effective, strict=True)]
    return set_edits(scene, edits, in_model=in_model), regions


def regions_of(conditioning: Conditioning) -> list[Region]:
    """Return the regions of a conditioning's first entry that has some."""
    return next((found for edits in get_edits(conditioning) if (found := regions_of_edits(edits))), [])


def with_region_words(conditioning: Conditioning, words: Sequence[Sequence[TokenSpan]]) -> list[list[TokenSpan]]:
    """Add the words of its regions to those of each entry of a conditioning.

    Args:
        conditioning: Conditioning with or without regions.
        words: Words of each entry's own prompt.

    Returns:
        The words, as if the regions' prompts stood behind the entry's own.
    """
    joined = []
    for (tensor, options), spans in zip(conditioning, words, strict=True):
        all_words, start = list(spans), tensor.shape[1]
        for region in regions_of_edits(options.get(EDITS, ())):
            moved = ((span.word, tuple(start + position for position in span.positions)) for span in region.words)
            all_words += [TokenSpan(*each) for each in moved]
            start += region.context.shape[1]
        joined.append(all_words)
    return joined


def require_scene(scene: Conditioning) -> None:
    """Refuse a conditioning that holds the prompts of several images that belong together.

    Args:
        scene: Conditioning of the whole image.

    Raises:
        ValueError: If it comes from Prompt-to-Prompt Edit or is watched.
    """
    if any(isinstance(edit, PromptToPrompt) for edits in get_edits(scene) for edit in edits):
        raise ValueError(
            "scene comes from Prompt-to-Prompt Edit and holds several prompts: put Subject Regions before that node, "
            "once for the source and once for the edit."
        )
    if any(RECORDED_PROMPTS in options for _, options in scene):
        raise ValueError("scene comes from Record Attention: put that behind this node.")


def require_region(prompt: Conditioning, scene: Conditioning, name: str) -> None:
    """Refuse a conditioning that cannot be a region's.

    Args:
        prompt: Conditioning of the region.
        scene: Conditioning of the whole image.
        name: Name of the node's input that it came from.

    Raises:
        ValueError: If it does not fit; the message says why.
    """
    if len(prompt) not in (1, len(scene)):
        raise ValueError(
            f"{name} is combined of {len(prompt)} conditionings and scene of {len(scene)}: connect a single prompt, "
            "and combine behind this node."
        )
    width = scene[0][0].shape[-1]
    for tensor, options in prompt:
        if tensor.shape[-1] != width:
            raise ValueError(
                f"{name} is {tensor.shape[-1]} numbers wide and scene {width}: encode both with the CLIP of the same "
                "SD1.5 model."
            )
        if RECORDED_PROMPTS in options:
            raise ValueError(f"{name} comes from Record Attention: put that behind this node.")
        for edit in options.get(EDITS, ()):
            if isinstance(edit, PromptToPrompt):
                raise ValueError(
                    f"{name} comes from Prompt-to-Prompt Edit and holds several prompts: put Subject Regions before "
                    "that node, once for the source and once for the edit."
                )
            if isinstance(edit, Region):
                raise ValueError(f"{name} has regions itself: connect it to scene, and the other prompts to regions.")
        if foreign := _foreign_options(options):
            raise ValueError(
                f"{name} has {', '.join(foreign)}, which would be lost: apply areas, masks, ControlNets, hooks and "
                "ranges of steps to the conditioning that comes out of this node."
            )


def _region(
    entry: list[Any], mask: Tensor | Box, strength: float, feather: float, base_share: float, steps: StepRange
) -> Region:
    """A region of an entry of a conditioning, with the edits and the words of that entry."""
    tensor, options = entry
    words = tuple(options.get(TOKEN_SPANS) or ())
    return Region(tensor, mask, strength, feather, base_share, steps, options.get(EDITS, ()), words)


def _replace_prompt(scene: Conditioning, regions: Sequence[Region], *, in_model: bool) -> Conditioning:
    """The scene with another prompt: its areas, ControlNets and whatever else it has stay."""
    replaced = []
    for (_, options), region in zip(scene, regions, strict=True):
        own = {key: value for key, value in options.items() if key != TOKEN_SPANS}
        replaced.append([region.context, {**own, TOKEN_SPANS: list(region.words)} if region.words else own])
    if not any(region.edits for region in regions) and not any(get_edits(scene)):
        return replaced
    return set_edits(replaced, [region.edits for region in regions], in_model=in_model)


def _foreign_options(options: dict[str, Any]) -> list[str]:
    """What other nodes have put into a conditioning's dictionary and a region cannot keep."""
    foreign = {key for key in options if key not in HARMLESS and not key.startswith(OWN_PREFIX)}
    hooks = getattr(options.get("hooks"), "hooks", ())
    if not all(str(hook.hook_ref).startswith(OWN_PREFIX) for hook in hooks):
        foreign.add("hooks")
    if not all(key.startswith(OWN_PREFIX) for key in options.get("model_conds", {})):
        foreign.add("model_conds")
    return sorted(foreign)


def _mask_or_box(mask: Tensor | None, boxes: Sequence[Box | None], number: int) -> Tensor | Box:
    """Where a region is: its mask, else the box of its line."""
    if mask is not None:
        return _masks(mask, f"mask_{number}")
    box = boxes[number - 1] if number <= len(boxes) else None
    if box is None:
        raise ValueError(
            f"region_{number} has neither a mask nor a box: connect mask_{number}, or write its x, y, width and height "
            f"in line {number} of boxes."
        )
    return box


def _masks(mask: Tensor, name: str) -> Tensor:
    """A MASK as one mask for each image, [B, H, W]."""
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or not mask.numel():
        shape = " x ".join(map(str, mask.shape))
        raise ValueError(f"{name} is {shape}, but a mask is height x width, or several of these for several pictures.")
    return mask.float().cpu().nan_to_num().clamp(0, 1)
