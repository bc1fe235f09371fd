"""Recording the attention of a sampling run: Record Attention's way from a conditioning to an attention record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, merge_nested_dicts
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ....blip_qformer.attention.maps import Area, AttentionRecord, mean_attention
from ..checks import require_cross_attention
from ..conditioning import Conditioning
from .carrier import attach, detach, wrap_model
from .layers import ExtraOptions, calling_layer, conditioning_rows, latent_size, map_size, require_known_rows
from .predictions import OwnPredictions
from .regions import RUN_REGIONS, RunRegions
from .uncompiled import run_uncompiled

#: Key of a conditioning's dictionary for its :class:`RecordedPrompt`s, and reference of the hook that comes with them.
RECORDED_PROMPTS = "blip_attention_records"


@dataclass(frozen=True)
class RecordedPrompt:
    """A record that wants the attention on a conditioning.

    Attributes:
        record: Record that is filled.
        prompt: Index of the conditioning's prompt in the record.
        tokens: Number of tokens of that prompt, behind which those of its regions are recorded.
    """

    record: AttentionRecord
    prompt: int
    tokens: int


def record_attention(conditioning: Conditioning, record: AttentionRecord, *, in_model: bool = False) -> Conditioning:
    """Return a copy of a conditioning that fills a record whenever it is sampled with, and does nothing else.

    Args:
        conditioning: Conditioning with as many entries as the record has prompts.
        record: Record that is filled, in each run anew.
        in_model: Whether the sampler gets a MODEL from :func:`model_for_records`.
    """
    recorded_prompts = [
        (*options.get(RECORDED_PROMPTS, ()), RecordedPrompt(record, prompt, tensor.shape[1]))
        for prompt, (tensor, options) in enumerate(conditioning)
    ]
    return attach(conditioning, RECORDED_PROMPTS, recorded_prompts, sample_and_record, in_model=in_model)


def model_for_records(model: ModelPatcher | None) -> ModelPatcher | ExecutionBlocker:
    """Return a copy of a MODEL with which conditionings need no hook to be recorded, see :func:`.wrap_model`.

    Raises:
        ValueError: The model has no cross-attention.
    """
    if model is not None:
        require_cross_attention(model)
    return wrap_model(model, RECORDED_PROMPTS, sample_and_record)


def sample_and_record(executor: WrapperExecutor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wrap a whole sampling run of the host: records are emptied before it, and filled by a patch that ends with it.

    Args:
        executor: What the host would have called; its ``class_obj`` is the guider.
        noise: Noise of shape [B, 4, h, w].
        *args: Further arguments, which are passed on.
        **kwargs: Further arguments, which are passed on.

    Returns:
        Sampled latents of shape [B, 4, h, w], the same to the last bit as without recording.

    Raises:
        ValueError: If the model has no cross-attention.
    """
    guider = cast(comfy.samplers.CFGGuider, executor.class_obj)
    detached = detach(guider, RECORDED_PROMPTS)
    if not detached:
        return executor(noise, *args, **kwargs)
    require_cross_attention(guider.model_patcher)
    run_uncompiled(guider.model_options)
    recorder = AttentionRecorder(guider, detached, noise)
    for record in recorder.records:
        record.start(*noise.shape[-2:])
    try:
        return executor(noise, *args, **kwargs)
    finally:  # a run that was cancelled leaves nothing on the device either
        for record in recorder.records:
            record.finish()


class AttentionRecorder:
    """Fills the records of one sampling run.

    A record whose conditioning stands on several sides of the guider is filled from the first of them.

    Args:
        guider: Guider of the run; patch and wrappers are added to its model options, which are its own copies.
        detached: For each recorded conditioning its side, such as ``positive``, its entry, and who records it.
        noise: Noise of shape [B, 4, h, w].
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        detached: Sequence[tuple[str, dict[str, Any], tuple[RecordedPrompt, ...]]],
        noise: Tensor,
    ) -> None:
        self.guider = guider
        self.batch_size, self.size = len(noise), tuple(noise.shape[-2:])
        self.unet = guider.model_patcher.model.diffusion_model
        self.prompts: dict[UUID, list[RecordedPrompt]] = {}
        sides: dict[AttentionRecord, str] = {}
        for side, entry, recorded_prompts in detached:
            wanted = [each for each in recorded_prompts if sides.setdefault(each.record, side) == side]
            self.prompts[entry["uuid"]] = wanted
        self.predictions = OwnPredictions({entry["uuid"]: side for side, entry, _ in detached})
        self.predictions.install(guider.model_options)
        options = {"transformer_options": {"patches": {"attn2_patch": [self.patch_cross]}}}
        merge_nested_dicts(guider.model_options, options, copy_dict1=False)

    @property
    def records(self) -> set[AttentionRecord]:
        """All records that this run fills."""
        return {each.record for recorded_prompts in self.prompts.values() for each in recorded_prompts}

    def patch_cross(
        self, query: Tensor, context: Tensor, values: Tensor, extra_options: ExtraOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a layer's maps to the records and change nothing; an ``attn2_patch``.

        The host's fused attention has no maps, so they are computed beside it.

        Args:
            query: Hidden states that queries are projected from, of shape [B, h * w, C].
            context: Prompt that keys are projected from, of shape [B, T, C'].
            values: Prompt that values are projected from, of shape [B, T, C'].
            extra_options: What the host tells a patch.

        Returns:
            Hidden states and prompts as they came.

        Raises:
            ValueError: If the call is for a part of the batch or of the images.
        """
        layer = calling_layer(self.unet, extra_options)
        entries = {entry["uuid"]: entry for entries in self.guider.conds.values() for entry in entries}
        for uuid, rows in conditioning_rows(len(query), extra_options):
            if not self.prompts.get(uuid) or uuid not in self.predictions.ids:
                continue
            entry = entries[uuid]
            area = self.area_of(entry)
            self.require_whole_images(len(query), extra_options, area)
            q, k = layer.to_q(query[rows]), layer.to_k(context[rows])
            maps = mean_attention(q, k, layer.heads, tokens=entry["cross_attn"].shape[1])  # [B, tokens, h * w]
            regions: RunRegions | None = extra_options.get(RUN_REGIONS)
            for recorded in self.prompts[uuid]:
                own = maps[:, : recorded.tokens]  # what was concatenated behind this node is no word of the record
                own = own if regions is None else regions.add_region_maps(uuid, q, own, extra_options)
                recorded.record.add(recorded.prompt, own.unflatten(-1, map_size(extra_options)), area)
        return query, context, values

    def area_of(self, entry: dict[str, Any]) -> Area:
        """Return the area of a conditioning's entry, which ends where the latents end."""
        height, width, top, left = entry.get("area", (*self.size, 0, 0))
        return Area(min(height, self.size[0] - top), min(width, self.size[1] - left), top, left)

    def require_whole_images(self, batch_size: int, extra_options: ExtraOptions, area: Area) -> None:
        """Refuse to record a call of the model for a part of the batch or of the images.

        Args:
            batch_size: Number of rows in the call.
            extra_options: What the host tells a patch.
            area: Area of the conditioning.

        Raises:
            ValueError: The images are sampled in tiles, or the batch in windows.
        """
        require_known_rows(batch_size, extra_options)
        if (size := latent_size(extra_options)) != (area.height, area.width):
            raise ValueError(
                f"The model was called with a tile of {size[1]} x {size[0]} of latents of {area.width} x "
                f"{area.height}, and Record Attention notes attention in whole pictures: take out what draws the "
                "picture in tiles, or Record Attention."
            )
        if (count := len(extra_options["sigmas"])) != self.batch_size:
            raise ValueError(
                f"The model was called with {count} of the sampler's {self.batch_size} pictures, and Record Attention "
                "notes the attention of all: take out what draws the batch in windows, or Record Attention."
            )


def require_recorded(record: AttentionRecord, images: Tensor) -> None:
    """Refuse a record that does not belong to some images.

    Args:
        record: Record of a sampling run.
        images: Images of shape [B, H, W, C].

    Raises:
        ValueError: If nothing is recorded, or another number of images.
    """
    if not record.batch_size:
        raise ValueError(
            "Nothing was recorded: connect Record Attention's conditioning to the positive input of the KSampler that "
            "draws this image, and let it draw once more with another seed. Behind conditioning_from of Concat or "
            "Average, a recording is lost: put Record Attention behind that node."
        )
    if record.batch_size != len(images):
        raise ValueError(
            f"The image holds {len(images)} picture(s), but {record.batch_size} were recorded: connect the image that "
            "the KSampler behind Record Attention drew."
        )
