"""Local blend in one sampling run: masks of the blend words' maps or of regions, and latents blended by the masks.

The functions on tensors are those of :mod:`blip_qformer.attention.local_blend` (arXiv 2208.01626, section 4).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.extra_samplers.uni_pc import sample_unipc, sample_unipc_bh2
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ....blip_qformer.attention.edits import regions_of
from ....blip_qformer.attention.injection import ConditioningRows
from ....blip_qformer.attention.local_blend import blend_latents, blend_mask, blend_predictions, edited_word_maps
from ....blip_qformer.attention.plan import StepPlan
from ....blip_qformer.attention.regions import regions_mask
from ..latents import Latent
from .edited_conditioning import EditedConditioning
from .layers import ExtraOptions, latent_size, map_size

#: Key of a latent's dictionary for its :class:`EditMasks`; the host's samplers pass on keys that they do not know.
EDIT_MASKS = "blip_edit_masks"

#: Samplers that hand the model a copy of their latents, and go on from that copy as they made it.
COPYING_SAMPLERS = (sample_unipc, sample_unipc_bh2)

PIXELS = 8  # of an image, for each of its latents' in height and width


class LocalBlend:
    """Restricts the edited images of a run to where their blend words attend, or to the regions of their prompts.

    Args:
        conditionings: Edited conditionings of the run by the host's ids; more may be added to it later.
        batch_size: Number of images in the run.
        group_size: Number of images in a group, a source and its edited images.
        size: Height and width of the latents.
    """

    def __init__(
        self,
        conditionings: Mapping[UUID, EditedConditioning],
        batch_size: int,
        group_size: int,
        size: tuple[int, int],
    ) -> None:
        self.conditionings = conditionings
        self.groups = batch_size // group_size
        self.group_size = group_size
        self.size = size
        self.region_masks = self._region_masks()
        self.writes_to_sampler = True
        self.maps: dict[tuple[UUID, int], Tensor] = {}  # (conditioning, image) -> [B / group_size, words, h, w]
        self.map_size = size

    def choose_sampler(self, sampler: comfy.samplers.Sampler) -> None:
        """Note whether the latents that a sampler hands the model are the ones it goes on from."""
        self.writes_to_sampler = getattr(sampler, "sampler_function", None) not in COPYING_SAMPLERS

    def predict_noise(self, predict: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Blend the latents before a call of the guider, and its prediction after it.

        The paper's sampler goes on from the blended latents, and so does one whose own latents these are. Where they
        are a copy (of an inpainting, or in uni_pc), the blended prediction leads an edited image to its source. The
        result is the same, unless a mask comes back to a pixel, or the sampler uses more than the prediction (noise of
        its own, cfg_pp): there it keeps a rest of the edit, which the model is not shown.

        Args:
            predict: What predicts the denoised latents of latents and the further arguments.
            x: Latents of shape [B, 4, h, w], changed in place where the sampler goes on from them.
            *args: Further arguments, which are passed on.
            **kwargs: Further arguments, which are passed on.

        Returns:
            Prediction of the denoised latents, of shape [B, 4, h, w].
        """
        blended = self.blend(x, blend_latents)
        if self.writes_to_sampler:
            x.copy_(blended)
        return self.blend(predict(blended, *args, **kwargs), blend_predictions)

    def add_maps(
        self,
        query: Tensor,
        key: Tensor,
        planned: list[tuple[UUID, ConditioningRows, StepPlan]],
        extra_options: ExtraOptions,
    ) -> None:
        """Add the maps of the blend words in a layer to those of the run.

        They are taken from the down and up blocks with the coarsest maps: in SD1.5 a quarter of the latents' edges.

        Args:
            query: Projected queries of shape [B, h * w, heads * d].
            key: Projected keys of shape [B, T, heads * d].
            planned: Edited rows of the batch and what is planned for them.
            extra_options: What the host tells a patch.

        Raises:
            ValueError: If the conditioning is for an area of the image, or the image is sampled in tiles.
        """
        wanted = [
            (uuid, rows, image, blend_plan)
            for uuid, rows, plan in planned
            for image, blend_plan in plan.blend_plans.items()
        ]
        if not wanted or extra_options["block"][0] == "middle":
            return
        if latent_size(extra_options) != self.size:
            raise ValueError(
                "Local blend of Prompt-to-Prompt Edit needs the whole picture at once, but this prompt has an area, or "
                "the picture is drawn in tiles: empty the blend words, or take the area or the tiles away."
            )
        size = map_size(extra_options)
        if size > self.map_size:
            return
        if size < self.map_size:  # on the first way down
            self.maps, self.map_size = {}, size
        for uuid, rows, image, plan in wanted:
            source, edited = ((query[rows.of(each)], key[rows.of(each)]) for each in (0, image))
            maps = edited_word_maps(source, edited, plan.source_columns, plan.edited_columns, extra_options["n_heads"])
            self.maps[uuid, image] = maps.unflatten(-1, size) + self.maps.get((uuid, image), 0)

    def masks(self) -> dict[int, Tensor]:
        """Return where each edited image may change, [groups, H, W], by its index in the group.

        Masks of blend words are boolean, those of regions in 0..1.
        """
        masks = dict(self.region_masks)
        for (uuid, image), maps in self.maps.items():
            edit = self.conditionings[uuid].prompt_to_prompt
            assert edit is not None  # maps are only made for such
            mask = blend_mask(maps.unbind(dim=1), self.size, edit.threshold)
            mask = mask.to(masks[image].device) if image in masks else mask
            masks[image] = torch.maximum(mask, masks.get(image, mask))
        return masks

    def blend(self, latents: Tensor, blend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return latents [B, 4, H, W] in which each edited image is its source outside its mask.

        Args:
            latents: Latents of shape [B, 4, H, W], or predictions of them.
            blend: Combines those of the sources and of edited images by a mask.
        """
        masks = self.masks()
        latents = latents.clone() if masks else latents
        for image, mask in masks.items():
            source, edited = latents[:: self.group_size], latents[image :: self.group_size]
            latents[image :: self.group_size] = blend(source, edited, mask.to(latents.device))
        return latents

    def finish(self, samples: Tensor) -> Tensor:
        """Blend the latents that a run ended with, and hand them and the masks to the edits that asked for these.

        Args:
            samples: Sampled latents of shape [B, 4, H, W].

        Returns:
            Blended latents of shape [B, 4, H, W].
        """
        samples, masks = self.blend(samples, blend_latents), self.masks()
        if not masks:
            return samples
        everywhere = torch.ones_like(next(iter(masks.values())))
        per_image = [masks.get(image, everywhere) for image in range(1, self.group_size)]
        joined = torch.stack(per_image, dim=1).flatten(0, 1)  # [B / group_size * edited images, H, W]
        for each in self.conditionings.values():
            edit = each.prompt_to_prompt
            if edit is not None and edit.keep_masks is not None:
                edit.keep_masks(samples.cpu(), joined.cpu())
        return samples

    def _region_masks(self) -> dict[int, Tensor]:
        """Where each edited image may change because of its conditionings' regions, [groups, H, W]."""
        masks: dict[int, Tensor] = {}
        for each in self.conditionings.values():
            edit, regions = each.prompt_to_prompt, regions_of(each.edits)
            if edit is None or not edit.blend_regions or not regions:
                continue
            mask = repeat_to_batch_size(regions_mask(regions, *self.size), self.groups)
            for image in range(1, self.group_size):
                masks[image] = torch.maximum(mask, masks.get(image, mask))
        return masks


class EditMasks:
    """Masks of local blend of the last runs, found again by the latents that a run ended with.

    A node's outputs are cached and used in many runs, and two samplers may use them in one; so masks cannot belong to
    the node.
    """

    RUNS = 8

    def __init__(self) -> None:
        self._runs: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.RUNS)

    def keep(self, samples: Tensor, masks: Tensor) -> None:
        """Keep what a run ended with.

        Args:
            samples: Sampled latents of shape [B, C, H, W].
            masks: Masks of shape [B', H, W], one for each edited image of each group.
        """
        self._runs.appendleft((samples, masks))

    def find(self, samples: Tensor) -> Tensor | None:
        """Return the masks [B', H, W] of the run that ended with these latents, None if it had no local blend."""
        return next((masks for sampled, masks in self._runs if torch.equal(sampled, samples.cpu())), None)


def edit_masks_of(latent: Latent) -> Tensor:
    """Return the masks of the run that a latent comes from, in pixels.

    Args:
        latent: LATENT of a sampler behind Prompt-to-Prompt Edit.

    Returns:
        Masks of shape [B', 8 H, 8 W] in 0..1, one for each edited image of each group.

    Raises:
        ValueError: If the latent was not sampled with local blend.
    """
    kept = latent.get(EDIT_MASKS)
    masks = None if kept is None else kept.find(latent["samples"])
    if masks is None:
        raise ValueError(
            "This latent was not drawn with local blend: write blend_words in Prompt-to-Prompt Edit or switch "
            "blend_regions on, connect both its outputs to the sampler, and the sampler's LATENT directly to Edit Mask."
        )
    return F.interpolate(masks[:, None].float(), scale_factor=PIXELS)[:, 0]
