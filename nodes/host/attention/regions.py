"""Regions of conditionings in one sampling run: keys and values by the calling layer, weights at its size.

The functions on tensors are those of :mod:`blip_qformer.attention.regions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ....blip_qformer.attention.edits import regions_of
from ....blip_qformer.attention.injection import Attend, ConditioningRows, attend_twice, edit_cross
from ....blip_qformer.attention.maps import Area, mean_attention
from ....blip_qformer.attention.plan import RegionPlan, StepPlan
from ....blip_qformer.attention.regions import (
    PixelWeights,
    RegionAttention,
    attend_regions,
    pixel_weights,
    region_weights,
)
from .edited_conditioning import EditedConditioning
from .layers import ExtraOptions, calling_layer, conditioning_rows, latent_size, map_size

#: Key of a run's options for its :class:`RunRegions`, by which Record Attention finds them.
RUN_REGIONS = "blip_regions"


class RunRegions:
    """Computes the cross-attentions of a run in which conditionings have regions.

    Args:
        guider: Guider of the run.
        edited: Edited conditionings of the run by the host's ids; more may be added to it later.
        size: Height and width of the run's latents.
        batch_size: Number of images in the run.
        group_size: Number of images in a group, a source and its edited images.
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        edited: Mapping[UUID, EditedConditioning],
        size: tuple[int, int],
        batch_size: int,
        group_size: int,
    ) -> None:
        self.guider = guider
        self.edited = edited
        self.plans: Mapping[UUID, StepPlan] = {}  # of the step
        self.size = size
        self.batch_size = batch_size
        self.group_size = group_size
        self.prompt_length = 0  # of the context of the last call, before other packs append tokens
        self._weights: dict[tuple[Any, ...], list[PixelWeights]] = {}

    @property
    def unet(self) -> UNetModel:
        """The U-Net of the run."""
        return self.guider.model_patcher.model.diffusion_model

    def areas(self) -> dict[UUID, Area]:
        """Return which part of the latents each conditioning is for, where it is not all of them."""
        entries = [entry for entries in self.guider.conds.values() for entry in entries]
        return {entry["uuid"]: Area(*entry["area"]) for entry in entries if "area" in entry}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        values: Tensor,
        extra_options: ExtraOptions,
        attend: Attend,
        replacement: Attend | None,
    ) -> Tensor:
        """Compute a cross-attention in which some conditionings have regions.

        Args:
            query: Projected queries of shape [B, h * w, C], before any edit.
            key: Projected keys of the conditionings' own prompts, of shape [B, T, C].
            values: Projected values of these prompts, of shape [B, T, C].
            extra_options: What the host tells a patch.
            attend: The attention.
            replacement: Another pack's replacement of this attention, if there is one; it wants all rows of the call.

        Returns:
            Output of the attention, of shape [B, h * w, C].
        """
        calls, areas = conditioning_rows(len(query), extra_options), self.areas()
        attentions = [
            self.attentions(key[rows], values[rows], self.plans.get(uuid, StepPlan()), areas.get(uuid), extra_options)
            for uuid, rows in calls
        ]
        if replacement is not None:
            return self.attend_by_replacement(query, attentions, key.shape[1] - self.prompt_length, attend, replacement)
        outputs = [
            attend_regions(query[rows], each, self.group_size, attend)
            for (_, rows), each in zip(calls, attentions, strict=True)
        ]
        return torch.cat(outputs)

    def attentions(
        self, key: Tensor, values: Tensor, plan: StepPlan, area: Area | None, extra_options: ExtraOptions
    ) -> list[RegionAttention]:
        """Return the attentions to the prompts of one conditioning: its own, and that of each region.

        Args:
            key: Projected keys of its own prompt, of shape [B, T, C].
            values: Projected values of its own prompt, of shape [B, T, C].
            plan: What its edits do in this step.
            area: The part of the latents that it is for; None means all.
            extra_options: What the host tells a patch.
        """
        layer, batch_size = calling_layer(self.unet, extra_options), len(key)
        if plan.regions:
            self.require_whole_images(batch_size, plan.regions, area, extra_options)
        weights = self.weights(plan.regions, area, map_size(extra_options), batch_size, key.device)
        attentions = [RegionAttention(key, values, weights[0], plan)]
        # What other packs append to the prompt stands behind each region's too.
        key_behind, values_behind = key[:, self.prompt_length :], values[:, self.prompt_length :]
        for region, own_weights in zip(plan.regions, weights[1:], strict=True):
            context = region.context.to(key)
            own_key, own_values = (repeat_to_batch_size(to(context), batch_size) for to in (layer.to_k, layer.to_v))
            own_key, own_values = torch.cat([own_key, key_behind], 1), torch.cat([own_values, values_behind], 1)
            attentions.append(RegionAttention(own_key, own_values, own_weights, region.plan))
        return attentions

    def require_whole_images(
        self, batch_size: int, regions: Sequence[RegionPlan], area: Area | None, extra_options: ExtraOptions
    ) -> None:
        """Refuse a call of the model for a part of the images or of the batch, of which it is not known which it is.

        Args:
            batch_size: Number of images in the call.
            regions: Regions of this step.
            area: The part of the latents that the conditioning is for; None means all.
            extra_options: What the host tells a patch.

        Raises:
            ValueError: The images are sampled in tiles, or a batch with masks or prompts of its own in windows.
        """
        top, left = (area.top, area.left) if area else (0, 0)
        height, width = (area.height, area.width) if area else self.size
        expected = min(height, self.size[0] - top), min(width, self.size[1] - left)
        if (size := latent_size(extra_options)) != expected:
            raise ValueError(
                f"The model was called with a tile of {size[1]} x {size[0]} of latents of {expected[1]} x "
                f"{expected[0]}, but the masks of Subject Regions are for the whole picture: take out what draws the "
                "picture in tiles, or Subject Regions."
            )
        masks = [each.region.mask for each in regions if isinstance(each.region.mask, Tensor)]
        if batch_size != self.batch_size and max(map(len, [*masks, *(each.context for each in regions)])) > 1:
            raise ValueError(
                f"The model was called with {batch_size} of the sampler's {self.batch_size} pictures, but Subject "
                "Regions has a mask or a prompt for each: take out what draws the batch in windows, or use one mask "
                "and one subject for all."
            )

    def add_region_maps(self, uuid: UUID, query: Tensor, maps: Tensor, extra_options: ExtraOptions) -> Tensor:
        """Weight the maps of a conditioning's own prompt in a layer, and add those of its regions.

        Args:
            uuid: The host's id of the conditioning.
            query: Projected queries of its rows, of shape [B, h * w, C].
            maps: Maps of its own prompt, of shape [B, tokens, h * w].
            extra_options: What the host tells a patch.

        Returns:
            Maps of shape [B, all tokens, h * w]: those of its own prompt, and behind them those of each region.
        """
        regions = regions_of(self.edited[uuid].edits) if uuid in self.edited else []
        if not regions:
            return maps
        layer, plan = calling_layer(self.unet, extra_options), self.plans.get(uuid, StepPlan())
        weights = self.weights(plan.regions, self.areas().get(uuid), map_size(extra_options), len(maps), maps.device)
        all_maps = [maps * _weights_of_all(weights[0], len(maps), query).mT]
        active = {
            planned.region: (planned.context, own) for planned, own in zip(plan.regions, weights[1:], strict=True)
        }
        for region in regions:
            context, own_weights = active.get(region, (region.context.to(maps.device), None))
            if own_weights is None:  # outside its steps
                all_maps.append(maps.new_zeros(len(maps), context.shape[1], maps.shape[-1]))
                continue
            key = repeat_to_batch_size(layer.to_k(context.to(query)), len(maps))
            own_maps = mean_attention(query, key, layer.heads, tokens=context.shape[1])
            all_maps.append(own_maps * _weights_of_all(own_weights, len(maps), query).mT)
        return torch.cat(all_maps, dim=1)

    def attend_by_replacement(
        self,
        query: Tensor,
        attentions: Sequence[Sequence[RegionAttention]],
        behind: int,
        attend: Attend,
        replacement: Attend,
    ) -> Tensor:
        """Compute the same by another pack's replacement, once for each prompt, and for all pixels.

        Args:
            query: Projected queries of shape [B, h * w, C].
            attentions: Attentions to the prompts of each conditioning; these have as many rows each.
            behind: Number of tokens that other packs have appended to each prompt.
            attend: The attention.
            replacement: The replacement.

        Returns:
            Output of the attention, of shape [B, h * w, C].
        """
        attended = torch.zeros_like(query)
        count = len(query) // len(attentions)
        rows = [ConditioningRows(start, start + count, self.group_size) for start in range(0, len(query), count)]
        for number in range(max(map(len, attentions))):
            # A conditioning with fewer prompts attends to its own once more, without weight.
            each = [prompts[number if number < len(prompts) else 0] for prompts in attentions]
            weights = [
                _weights_of_all(attention.weights, count, query) * (number < len(prompts))
                for attention, prompts in zip(each, attentions, strict=True)
            ]
            planned = [(own_rows, attention.plan) for own_rows, attention in zip(rows, each, strict=True)]
            key = _repeat_to_same_length([attention.key for attention in each], behind)
            values = _repeat_to_same_length([attention.values for attention in each], behind)
            edited = edit_cross(query, key, values, planned)
            attended = attended + attend_twice(*edited, planned, attend, replacement) * torch.cat(weights)
        return attended

    def weights(
        self,
        regions: Sequence[RegionPlan],
        area: Area | None,
        size: tuple[int, int],
        batch_size: int,
        device: torch.device,
    ) -> list[PixelWeights]:
        """Return the weights of a conditioning's own prompt and of its regions, which are made once for each size.

        Args:
            regions: Regions of this step.
            area: The part of the latents that the conditioning is for; None means all.
            size: Height and width of the layer's maps.
            batch_size: Number of images.
            device: Device of the weights.
        """
        key = (*(id(each.region) for each in regions), area, size, batch_size, device)
        if key not in self._weights:
            weights = torch.ones(1, 1, *self.size)
            if regions:
                weights = region_weights([each.region for each in regions], *self.size)
            if weights.shape[1] > 1:  # a mask for each image
                weights = repeat_to_batch_size(weights, batch_size // self.group_size, dim=1)
                weights = weights.repeat_interleave(self.group_size, dim=1)
            if area is not None:
                rows = slice(area.top, area.top + area.height)
                weights = weights[..., rows, area.left : area.left + area.width]
            self._weights[key] = pixel_weights(weights.to(device), size)
        return self._weights[key]


def _weights_of_all(weights: PixelWeights, rows: int, query: Tensor) -> Tensor:
    """Weights of all pixels of a query [B, N, C] in some of its rows, of shape [rows, N, 1]."""
    spread = query.new_zeros(rows, query.shape[1], 1)
    spread[:, slice(None) if weights.pixels is None else weights.pixels, 0] = weights.weights.to(query)
    return spread


def _repeat_to_same_length(tensors: Sequence[Tensor], behind: int) -> Tensor:
    """Join keys or values along the batch: shorter prompts are repeated, as the host does, but not what is behind."""
    length = math.lcm(*(tensor.shape[1] - behind for tensor in tensors))
    repeated = []
    for tensor in tensors:
        own = tensor.shape[1] - behind
        repeated.append(torch.cat([tensor[:, :own].repeat(1, length // own, 1), tensor[:, own:]], dim=1))
    return torch.cat(repeated)
