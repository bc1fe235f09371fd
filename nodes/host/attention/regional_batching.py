"""Prompt-to-Prompt Edit on conditionings with regions: each region follows its own source, or stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ....blip_qformer.attention.edits import Edit, Region, Reweight, regions_of
from ....blip_qformer.attention.prompt_to_prompt import PromptGroup, PromptToPromptSettings, build_regional_edits
from ....blip_qformer.prompt import TokenSpan
from ..conditioning import Conditioning
from .hooks import get_edits, set_edits


def edits_with_regions(
    conditionings: Sequence[Conditioning],
    entry: int,
    words: Sequence[Sequence[TokenSpan]],
    reweights: Sequence[Reweight],
    settings: PromptToPromptSettings,
    keep_masks: Callable[[Tensor, Tensor], None],
) -> tuple[Edit, ...]:
    """Build the edits of a group whose prompts have regions.

    Args:
        conditionings: Conditionings of the source and of each edited image, with the same regions.
        entry: Index of an entry of the conditionings.
        words: Words of the source's and of each edited image's own prompt.
        reweights: Weights that these prompts carry already.
        settings: How edited images follow their source.
        keep_masks: Receives the masks of local blend.

    Returns:
        Edits of the scene's prompt, and the regions with edits of theirs.
    """
    groups = [PromptGroup(words, conditionings[0][entry][0].shape[1], reweights)]
    regions = list(zip(*(regions_of(get_edits(each)[entry]) for each in conditionings), strict=True))
    for same in regions:
        own_reweights = [
            replace(edit, image=image)
            for image, region in enumerate(same)
            for edit in region.edits
            if isinstance(edit, Reweight)
        ]
        groups.append(PromptGroup([region.words for region in same], same[0].context.shape[1], own_reweights))
    scene_edits, *region_edits = build_regional_edits(groups, settings, keep_masks)
    joined = [
        replace(same[0], context=torch.cat([region.context for region in same]), edits=edits, words=())
        for same, edits in zip(regions, region_edits, strict=True)
    ]
    return (*scene_edits, *joined)


def with_regions_of(
    edited: Conditioning, source: Conditioning, words: Sequence[Sequence[TokenSpan]], *, in_model: bool
) -> Conditioning:
    """Return a source that is divided into the regions of its edited image, if it has none itself.

    Each of them has the source's own prompt, so that the source stays what it is.

    Args:
        edited: Conditioning of the edited image.
        source: Conditioning of the source image, with as many entries.
        words: Words of each entry of the source.
        in_model: Whether the sampler gets a MODEL that knows of edits.
    """
    if any(regions_of(edits) for edits in get_edits(source)):
        return source
    divided = [
        (*own, *(replace(region, context=tensor, edits=own, words=tuple(spans)) for region in regions_of(edits)))
        for (tensor, _), own, edits, spans in zip(source, get_edits(source), get_edits(edited), words, strict=True)
    ]
    return set_edits(source, divided, in_model=in_model) if any(map(regions_of, divided)) else source


def require_regions_to_blend(edited: Conditioning) -> None:
    """Refuse to keep an edit to regions that are not there.

    Args:
        edited: Conditioning of an edited image.

    Raises:
        ValueError: If none of its entries has regions.
    """
    if not any(regions_of(edits) for edits in get_edits(edited)):
        raise ValueError(
            "blend_regions is on, but edited has no regions: put it through Subject Regions, or switch blend_regions "
            "off."
        )


def require_same_regions(
    conditioning: Conditioning, source: Conditioning, name: str, settings: PromptToPromptSettings
) -> None:
    """Refuse a group whose prompts have different regions.

    Args:
        conditioning: Conditioning of an image of the group.
        source: Conditioning of the source image.
        name: Name of the node's input that the first came from.
        settings: How edited images follow their source.

    Raises:
        ValueError: If they are not the same but for their prompts, or local blend is asked for.
    """
    for edits, source_edits in zip(get_edits(conditioning), get_edits(source), strict=True):
        regions, source_regions = regions_of(edits), regions_of(source_edits)
        if len(regions) != len(source_regions):
            raise ValueError(
                f"{name} has {len(regions)} regions and source {len(source_regions)}: put both through Subject Regions "
                "with the same regions; only the prompts may differ."
            )
        if regions and settings.has_local_blend:
            raise ValueError(
                "Blend words do not work with Subject Regions: empty them, and switch blend_regions on, which keeps "
                "the picture outside the boxes and masks of the regions."
            )
        for number, pair in enumerate(zip(regions, source_regions, strict=True), start=1):
            _require_same_region(*pair, f"Region {number} of {name} and of source")


def _require_same_region(region: Region, source: Region, names: str) -> None:
    """Refuse two regions that differ in more than their words."""
    if not region.has_layout_of(source):
        raise ValueError(
            f"{names} are not in the same place: give both Subject Regions the same boxes, masks and numbers; only the "
            "prompts may differ."
        )
    if region.context.shape != source.context.shape or len(source.context) != 1:
        rows = " and ".join(f"{len(each.context)} x {each.context.shape[1]}" for each in (region, source))
        raise ValueError(
            f"{names} have {rows} tokens: use single subjects, and prompts that fill the same number of blocks of 77 "
            "tokens."
        )
    if not (region.words and source.words):
        raise ValueError(
            f"{names} do not both say which token is which word: take their prompts from Subject Prompt Compose."
        )
