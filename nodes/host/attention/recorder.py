"""Record Attention · Subject Attention Map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import comfy.hooks
import comfy.samplers
import comfy.sd
from comfy.ldm.modules.attention import CrossAttention, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import Tensor

from ....blip_qformer.attention.maps import Area, AttentionRecord, mean_attention
from ..checks import require_cross_attention
from ..conditioning import Conditioning
from .hooks import hook_group, take_off_hook

#: Key of a conditioning's dictionary for its :class:`Watch`es, and name of the hook that brings them to the sampler.
WATCHES = "blip_attention_watches"


POSITIVE = 0  # the host's number in cond_or_uncond for rows of the positive conditioning


@dataclass(frozen=True)
class Watch:
    """Who wants to know about a conditioning, and as which of its prompts."""

    record: AttentionRecord
    prompt: int


def watched(conditioning: Conditioning, record: AttentionRecord) -> Conditioning:
    """A conditioning that fills a record whenever it is sampled with, and is otherwise as it was."""
    hook = comfy.hooks.TransformerOptionsHook({"wrappers": {WrappersMP.OUTER_SAMPLE: {WATCHES: [watch_run]}}})
    hook.hook_ref = WATCHES  # the host compares hooks by this: ours are all one, however many conditionings bring it
    marked = [
        [tensor, {**options, WATCHES: (*options.get(WATCHES, ()), Watch(record, prompt))}]
        for prompt, (tensor, options) in enumerate(conditioning)
    ]
    return comfy.hooks.set_hooks_for_conditioning(marked, hook_group([hook]))


def watch_run(executor: Callable, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Around a whole run of the host's sampler: fresh records, and a patch that fills them and ends with the run.

    Raises:
        ValueError: the model has no cross-attention.
    """
    guider = executor.class_obj
    require_cross_attention(guider.model_patcher)
    watches = take_watches(guider)
    records = {watch.record for each in watches.values() for watch in each}
    patch = partial(watch_layer, watches, guider, guider.model_patcher.model.diffusion_model)
    options = {"transformer_options": {"patches": {"attn2_patch": [patch]}}}
    merge_nested_dicts(guider.model_options, options, copy_dict1=False)
    for record in records:
        record.start(*noise.shape[-2:])
    try:
        return executor(noise, *args, **kwargs)
    finally:  # a run that was cancelled leaves nothing on the device either
        for record in records:
            record.finish()


def take_watches(guider: comfy.samplers.CFGGuider) -> dict[UUID, tuple[Watch, ...]]:
    """Take watches and hook off the conditionings of a run, so that the picture is the same to the last bit."""
    entries = [entry for entries in guider.conds.values() for entry in entries]
    watches = {entry["uuid"]: entry.pop(WATCHES) for entry in entries if WATCHES in entry}
    take_off_hook(guider, WATCHES)
    return watches


def watch_layer(
    watches: dict[UUID, tuple[Watch, ...]],
    guider: comfy.samplers.CFGGuider,
    unet: UNetModel,
    places: Tensor,
    context: Tensor,
    values: Tensor,
    extra_options: dict,
) -> tuple[Tensor, Tensor, Tensor]:
    """An attn2_patch that changes nothing. The host's fused attention has no maps, so they are made beside it.

    Args:
        places, context, values: of which queries, keys and values are made, [B, h * w, C], [B, T, C'] and the same.
    """
    attention = cross_attention(unet, extra_options)
    uuids, kinds = extra_options["uuids"], extra_options["cond_or_uncond"]
    count = len(places) // len(uuids)
    conds = {cond["uuid"]: cond for conds in guider.conds.values() for cond in conds}
    for index, (uuid, kind) in enumerate(zip(uuids, kinds, strict=True)):
        if kind != POSITIVE or uuid not in watches:  # an area has a counterpart in the negative, of the same uuid
            continue
        cond, rows = conds[uuid], slice(index * count, (index + 1) * count)
        query, key = attention.to_q(places[rows]), attention.to_k(context[rows])
        maps = mean_attention(query, key, attention.heads, tokens=cond["cross_attn"].shape[1])  # [B, tokens, h * w]
        maps = maps.unflatten(-1, extra_options["activations_shape"][-2:])
        area = Area(*cond["area"]) if "area" in cond else None
        for watch in watches[uuid]:
            watch.record.add(watch.prompt, maps, area)
    return places, context, values


def cross_attention(unet: UNetModel, extra_options: dict) -> CrossAttention:
    """The layer that a patch was called from."""
    name, index = extra_options["block"]
    block = unet.middle_block if name == "middle" else getattr(unet, f"{name}_blocks")[index]
    (transformer,) = [layer for layer in block if isinstance(layer, SpatialTransformer)]
    return transformer.transformer_blocks[extra_options["block_index"]].attn2


def check_recorded(record: AttentionRecord, image: Tensor) -> None:
    """Refuse a record that does not belong to the pictures.

    Raises:
        ValueError: nothing is recorded, or another number of pictures.
    """
    if not record.batch_size:
        raise ValueError(
            "Nothing was recorded: connect Record Attention's conditioning to the positive input of the KSampler that "
            "draws this image, and let it draw once more with another seed."
        )
    if record.batch_size != len(image):
        raise ValueError(
            f"The image holds {len(image)} picture(s), but {record.batch_size} were recorded: connect the image that "
            "the KSampler behind Record Attention drew."
        )
