"""Prompt-to-Prompt Edit on conditionings: a source and its edited prompts become one batch that carries the edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ....blip_qformer.attention.edits import Edit, PromptToPrompt, Reweight, regions_of
from ....blip_qformer.attention.prompt_to_prompt import PromptToPromptSettings, build_edits
from ....blip_qformer.prompt import TokenSpan
from ..conditioning import TOKEN_SPANS, Conditioning, stack_rows
from ..inversion import INVERTED_WITH_GUIDANCE
from ..latents import Latent
from ..prompt_words import token_spans
from .hooks import EDITS, get_edits, set_edits
from .local_blend import EDIT_MASKS, EditMasks
from .recorder import RECORDED_PROMPTS
from .regional_batching import edits_with_regions, require_regions_to_blend, require_same_regions, with_regions_of

OWN_KEYS = {"pooled_output", TOKEN_SPANS, EDITS}  # of a conditioning's dictionary: may differ within a group


def batch_edits(
    source: Conditioning,
    edited: Sequence[Conditioning],
    latent: Latent,
    settings: PromptToPromptSettings,
    clip: comfy.sd.CLIP | None = None,
    source_text: str = "",
    edited_text: str = "",
    *,
    in_model: bool = False,
) -> tuple[Conditioning, Latent]:
    """Join a source and its edited prompts to one conditioning with edits, and repeat a latent for each of them.

    Args:
        source: Conditioning of the source image, with one row.
        edited: Conditioning of each edited image, with one row.
        latent: Latents of N images.
        settings: How edited images follow their source.
        clip: Text encoder of conditionings that do not know their words.
        source_text: Text that such a source was encoded from.
        edited_text: Text that such an edited conditioning was encoded from; with several, a line for each.
        in_model: Whether the sampler gets a MODEL that knows of edits.

    Returns:
        A conditioning with a row for each image of a group, and latents of N groups that start from the same noise.

    Raises:
        ValueError: If the conditionings do not fit together, a word is not in its prompt, or the latent was inverted in
            another way than its source is sampled.
    """
    if settings.source_unguided and latent.get(INVERTED_WITH_GUIDANCE):
        raise ValueError(
            "DDIM Inversion's model comes from a node that changes guidance, such as PAG, and source_unguided draws "
            "the source without it: connect DDIM Inversion's model from before that node, so that the photograph comes "
            "back."
        )
    joined = join_rows(source, edited)
    words = words_of_each([source, *edited], clip, source_text, edited_text)
    if settings.blend_regions:
        require_regions_to_blend(edited[0])
    source = with_regions_of(edited[0], source, words[0], in_model=in_model)
    for number, each in enumerate(edited, start=1):
        require_same_regions(each, source, "edited" if number == 1 else f"edited_{number}", settings)
    masks = EditMasks()
    edits: list[tuple[Edit, ...]] = []
    for index, (tensor, _) in enumerate(joined):
        source_words, *edited_words = (each[index] for each in words)
        reweights = reweights_of_each([source, *edited], index)
        if regions_of(get_edits(source)[index]):
            prompts = [each[index] for each in words]
            edits.append(edits_with_regions([source, *edited], index, prompts, reweights, settings, masks.keep))
            continue
        edits.append(build_edits(source_words, edited_words, tensor.shape[1], settings, masks.keep, reweights))
    if any(edits):
        joined = set_edits(joined, edits, in_model=in_model)
    return joined, repeat_for_group(latent, 1 + len(edited), masks)


def join_rows(source: Conditioning, edited: Sequence[Conditioning]) -> Conditioning:
    """Join conditionings of one row each to one with a row for each; everything else is the source's.

    Args:
        source: Conditioning of the source image.
        edited: Conditioning of each edited image.

    Raises:
        ValueError: If they do not fit together.
    """
    for index, each in enumerate((source, *edited)):
        require_fit(each, source, name="source" if index == 0 else "edited" if index == 1 else f"edited_{index}")
    joined = stack_rows([source, *edited])
    return [
        [tensor, {key: value for key, value in options.items() if key != TOKEN_SPANS}] for tensor, options in joined
    ]


def require_fit(conditioning: Conditioning, source: Conditioning, name: str) -> None:
    """Refuse a conditioning that cannot be sampled in one batch with the source's.

    Args:
        conditioning: Conditioning of an image of the group.
        source: Conditioning of the source image.
        name: Name of the node's input that the conditioning came from.

    Raises:
        ValueError: If it does not fit; the message says why.
    """
    if len(conditioning) != len(source):
        raise ValueError(
            f"{name} is combined of {len(conditioning)} conditionings and source of {len(source)}: combine them behind "
            "this node, or with the same number."
        )
    for (tensor, options), (source_tensor, source_options) in zip(conditioning, source, strict=True):
        if any(isinstance(edit, PromptToPrompt) for edit in options.get(EDITS, ())):
            raise ValueError(
                f"{name} comes from another Prompt-to-Prompt Edit: connect all edited conditionings to one such node."
            )
        if len(tensor) != 1:
            raise ValueError(
                f"{name} has {len(tensor)} rows, but each picture of the edit has one prompt: use a single subject, "
                'encoded as "one subject".'
            )
        if tensor.shape != source_tensor.shape:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens and source {source_tensor.shape[1]}: set overflow to truncate in "
                "Subject Prompt Compose, or make both prompts fill the same number of blocks of 77 tokens."
            )
        if RECORDED_PROMPTS in {*options, *source_options}:
            raise ValueError(f"{name} or source comes from Record Attention: put that behind this node.")
        ours, theirs = _common_options(options), _common_options(source_options)
        if differing := [key for key in {*ours, *theirs} if not have_same_contents(ours.get(key), theirs.get(key))]:
            raise ValueError(
                f"{name} and source differ in {', '.join(sorted(differing))}, but one call draws both: apply "
                "ControlNets, areas, masks and hooks to the conditioning that comes out of this node."
            )


def words_of_each(
    conditionings: Sequence[Conditioning], clip: comfy.sd.CLIP | None, source_text: str, edited_text: str
) -> list[list[list[TokenSpan]]]:
    """Return, for each conditioning of a group, the words of each of its entries.

    Args:
        conditionings: Conditionings of the source and of each edited image.
        clip: Text encoder of those that do not know their words.
        source_text: Text that the source was encoded from.
        edited_text: Text that the edited conditioning was encoded from; with several, a line for each.

    Raises:
        ValueError: If a conditioning does not know its words, and its text or the CLIP is missing.
    """
    edited_texts = [edited_text] if len(conditionings) == 2 else edited_text.splitlines()
    texts = [source_text, *edited_texts, *[""] * len(conditionings)]
    return [token_spans(each, clip, text) for each, text in zip(conditionings, texts, strict=False)]


def reweights_of_each(conditionings: Sequence[Conditioning], entry: int) -> list[Reweight]:
    """Return the weights that conditionings of a group carry, each now for its own image alone.

    Args:
        conditionings: Conditionings of the source and of each edited image.
        entry: Index of an entry of the conditionings.
    """
    return [
        replace(edit, image=image)
        for image, conditioning in enumerate(conditionings)
        for edit in get_edits(conditioning)[entry]
        if isinstance(edit, Reweight)
    ]


def repeat_for_group(latent: Latent, group_size: int, masks: EditMasks) -> Latent:
    """Repeat each image of a latent for its group, all with the same noise.

    Args:
        latent: Latents of N images.
        group_size: Number of images in a group, a source and its edited images.
        masks: Masks of local blend that later nodes find in the latent.

    Returns:
        Latents of N groups, the images of a group one behind the other.
    """
    samples = latent["samples"]
    repeated = {**latent, "samples": samples.repeat_interleave(group_size, dim=0), EDIT_MASKS: masks}
    numbers = latent.get("batch_index", range(len(samples)))
    # The host counts noise by batch_index: equal numbers get equal noise.
    repeated["batch_index"] = [number for number in numbers for _ in range(group_size)]
    if len(samples) > 1 and len(latent.get("noise_mask", ())) == len(samples):
        repeated["noise_mask"] = latent["noise_mask"].repeat_interleave(group_size, dim=0)
    return repeated


def have_same_contents(one: Any, other: Any) -> bool:
    """Whether two values are equal; tensors by their numbers, also in lists, tuples and dictionaries."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(have_same_contents(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(have_same_contents, one, other))
    return one == other


def _common_options(options: dict[str, Any]) -> dict[str, Any]:
    """What conditionings of one batch must have in common, without what brings our edits."""
    group = options.get("hooks")
    hooks = {hook for hook in group.hooks if hook.hook_ref != EDITS} if group else set()
    model_conds = {key: value for key, value in options.get("model_conds", {}).items() if key != EDITS}
    common = {key: value for key, value in options.items() if key not in OWN_KEYS}
    return {**common, "hooks": hooks, "model_conds": model_conds}
