"""One sampling run with edited attention: the bridge from the host's patches and wrappers to functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import comfy.samplers
import torch
from comfy.extra_samplers.uni_pc import sample_unipc, sample_unipc_bh2
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ....blip_qformer.attention.edits import Edit, PromptToPrompt
from ....blip_qformer.attention.injection import ConditioningRows, attend_twice, edit_cross, inject_self
from ....blip_qformer.attention.local_blend import blend_latents, blend_mask, edited_word_maps
from ....blip_qformer.attention.plan import StepPlan, can_need_two_attentions, plan_step
from ....blip_qformer.attention.schedule import step_of

KEY = "blip_attention"  # of our wrappers


QUARTER = 4  # self-injection goes up to maps of a quarter of the latent's edges: 16 x 16 for 512 x 512 pixels


#: Samplers that hand the model a copy of their latents, and then reckon with that copy as they made it.
COPYING_SAMPLERS = (sample_unipc, sample_unipc_bh2)


@dataclass(frozen=True)
class EditedConditioning:
    """A conditioning with edits.

    Attributes:
        side: the sampler's name for where it stands, such as ``positive``.
        edits: in the order in which they were made.
        rows, tokens: of its tensor.
    """

    side: str
    edits: tuple[Edit, ...]
    rows: int
    tokens: int

    @property
    def prompt_to_prompt(self) -> PromptToPrompt | None:
        return next((edit for edit in self.edits if isinstance(edit, PromptToPrompt)), None)


class AttentionRun:
    """What one sampling run does to attention, and what it has to remember for that.

    Args:
        edited: the conditionings with edits, by the host's name for each.
        noise: [B, C, H, W]
        sigmas: the schedule.

    Raises:
        ValueError: the batch is not made of the pictures that belong together.
    """

    def __init__(self, edited: dict[UUID, EditedConditioning], noise: Tensor, sigmas: Sequence[float]) -> None:
        self.group = common_group(list(edited.values()), len(noise))
        self.edited = edited
        self.sigmas = sigmas
        self.size = tuple(noise.shape[-2:])
        self.step = -1
        self.blends_in_place = True
        self.plans: dict[UUID, StepPlan] = {}
        self.maps: dict[tuple[UUID, int], Tensor] = {}  # of a conditioning's picture: [B / group, words, h, w]
        self.map_edges = self.size  # of those maps

    def install(self, guider: comfy.samplers.CFGGuider) -> None:
        """Put patches and wrappers into the options of this run; patches in front of those of other packs."""
        options = guider.model_options["transformer_options"]
        patches = options.setdefault("patches", {})
        patches["attn2_patch"] = [self.patch_cross, *patches.get("attn2_patch", [])]
        if self.prompt_to_prompts:
            patches["attn1_patch"] = [self.patch_self, *patches.get("attn1_patch", [])]
        if any(edit.has_local_blend or can_need_two_attentions(edit) for edit in self.prompt_to_prompts):
            replaced = options.setdefault("patches_replace", {}).setdefault("attn2", {})
            for block in {*attention_blocks(guider.model_patcher.model.diffusion_model), *replaced}:
                replaced[block] = partial(self.replace_cross, replaced.get(block))
        if any(edit.source_unguided for edit in self.prompt_to_prompts):
            post_cfg = guider.model_options.get("sampler_post_cfg_function", [])
            guider.model_options["sampler_post_cfg_function"] = [*post_cfg, self.unguide_sources]
        add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sample, guider.model_options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict, guider.model_options, is_model_options=True)

    def finish(self, samples: Tensor) -> Tensor:
        """What the sampler drew -> the same, blended once more, after the last step."""
        samples, masks = self.blended(samples), self.masks()
        for edit in self.prompt_to_prompts:
            if masks and edit.keep_masks is not None:
                everywhere = torch.ones_like(next(iter(masks.values())))
                kept = [masks.get(picture, everywhere) for picture in range(1, self.group)]
                edit.keep_masks(samples.cpu(), torch.stack(kept, dim=1).flatten(0, 1).cpu())
        return samples

    @property
    def prompt_to_prompts(self) -> list[PromptToPrompt]:
        return [edit for each in self.edited.values() if (edit := each.prompt_to_prompt) is not None]

    # What the host calls, from the outside in.

    def sample(self, executor: Callable, guider: comfy.samplers.CFGGuider, *args: Any) -> Tensor:
        """Before the first step: tell apart the copies of conditionings that the host has made by now.

        Where only one side has an area, the other gets a copy of that entry, with its name but with its own words.
        """
        self.blends_in_place = getattr(executor.class_obj, "sampler_function", None) not in COPYING_SAMPLERS
        entries = [(side, entry) for side, entries in guider.conds.items() for entry in entries]
        words = {
            id(entry["model_conds"].get("c_crossattn")): edited
            for side, entry in entries
            if (edited := self.edited.get(entry["uuid"])) and edited.side == side
        }
        for _, entry in entries:
            edited = words.get(id(entry["model_conds"].get("c_crossattn")))
            if edited is not self.edited.get(entry["uuid"]):
                entry["uuid"] = uuid4()
                if edited:
                    self.edited[entry["uuid"]] = edited
        return executor(guider, *args)

    def predict(self, executor: Callable, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Around a call of the model: what this step asks for, and local blend, of its latents and of its prediction.

        The latents are the sampler's own, so that it goes on from there as the paper's does; or they are a copy (of an
        inpainting, or in uni_pc), and the blended prediction brings an edit to its source. That is the same but where a
        mask comes back to a place, or the sampler goes by more than the prediction (noise of its own, cfg_pp): there it
        keeps a rest of the edit, which the model is not shown.
        """
        steps = len(self.sigmas) - 1
        step = step_of(float(sigma.max()), self.sigmas)
        if step != self.step:
            self.step = step
            self.plans = {uuid: plan_step(each.edits, step, steps, x.device) for uuid, each in self.edited.items()}
        blended = self.blended(x)
        if self.blends_in_place:
            x.copy_(blended)
        return self.blended(executor(blended, sigma, *args, **kwargs))

    def unguide_sources(self, args: dict[str, Any]) -> Tensor:
        """A post-CFG function: the sources take the conditional prediction as it is."""
        denoised = args["denoised"].clone()
        denoised[:: self.group] = args["cond_denoised"][:: self.group]
        return denoised

    def patch_self(
        self, places: Tensor, context: Tensor, values: Tensor, extra_options: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An attn1_patch; places, context and values, of which queries, keys and values are made, [B, h * w, C]."""
        edited = self.rows(places, extra_options)
        if any(plan.injects_self for _, plan in edited) and is_coarse(extra_options):
            context = inject_self(context, edited)
            places = inject_self(places, edited)
        return places, context, values

    def patch_cross(
        self, places: Tensor, context: Tensor, values: Tensor, extra_options: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An attn2_patch; places [B, h * w, C], context and values [B, T, C']."""
        return edit_cross(places, context, values, self.rows(places, extra_options))

    def replace_cross(
        self, other: Callable | None, query: Tensor, key: Tensor, values: Tensor, extra_options: dict
    ) -> Tensor:
        """An attn2_replace, around another pack's if there is one; query [B, h * w, C], key and values [B, T, C]."""

        def attend(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
            heads, precision = extra_options["n_heads"], extra_options["attn_precision"]
            return optimized_attention(
                query, key, values, heads, attn_precision=precision, transformer_options=extra_options
            )

        def attend_all(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
            return other(query, key, values, extra_options) if other else attend(query, key, values)

        self.look_for_words(query, key, extra_options)
        edited = self.rows(query, extra_options)
        if any(plan.needs_two_attentions for _, plan in edited):
            return attend_twice(query, key, values, edited, attend, attend_all)
        return attend_all(query, key, values)

    # What it is made of.

    def placed(self, batch: int, extra_options: dict) -> list[tuple[UUID, ConditioningRows]]:
        """Which rows of a call belong to which conditioning with edits.

        Raises:
            ValueError: the rows are not those of the sampler.
        """
        uuids, count = extra_options["uuids"], len(extra_options["sigmas"])
        if batch != len(uuids) * count:
            raise ValueError(
                f"The model was called with {batch} pictures where the sampler has {count} for each of {len(uuids)} "
                "prompts, so that it is not known which belongs to which: take out what draws the picture in tiles, or "
                "the attention edit."
            )
        if count % self.group:
            raise ValueError(
                f"The model was called with {count} pictures at a time, but Prompt-to-Prompt Edit needs its "
                f"{self.group} side by side: take out what draws the batch in windows."
            )
        return [
            (uuid, ConditioningRows(index * count, (index + 1) * count, self.group))
            for index, uuid in enumerate(uuids)
            if uuid in self.edited
        ]

    def rows(self, tensor: Tensor, extra_options: dict) -> list[tuple[ConditioningRows, StepPlan]]:
        """The same with what each does in this step."""
        return [(rows, self.plans[uuid]) for uuid, rows in self.placed(len(tensor), extra_options)]

    def look_for_words(self, query: Tensor, key: Tensor, extra_options: dict) -> None:
        """Add up where the words of local blend look, in the down and up blocks with the coarsest maps.

        In SD1.5 these have a quarter of the latent's edges.

        Raises:
            ValueError: the conditioning is for a part of the picture.
        """
        wanted = [
            (uuid, rows, picture, plan)
            for uuid, rows in self.placed(len(query), extra_options)
            for picture, plan in self.plans[uuid].blend_plans.items()
        ]
        if not wanted or extra_options["block"][0] == "middle":
            return
        if tuple(extra_options["original_shape"][-2:]) != self.size:
            raise ValueError(
                "Local blend of Prompt-to-Prompt Edit needs a prompt for the whole picture, but this one has an area: "
                "empty the blend words, or take the area away."
            )
        edges = tuple(extra_options["activations_shape"][-2:])
        if edges > self.map_edges:
            return
        if edges < self.map_edges:  # on the first way down
            self.maps, self.map_edges = {}, edges
        for uuid, rows, picture, plan in wanted:
            source, edited = ((query[rows.of(each)], key[rows.of(each)]) for each in (0, picture))
            maps = edited_word_maps(source, edited, plan.source_columns, plan.edited_columns, extra_options["n_heads"])
            self.maps[uuid, picture] = maps.unflatten(-1, edges) + self.maps.get((uuid, picture), 0)

    def masks(self) -> dict[int, Tensor]:
        """For each picture of a group that has local blend, where it is edited, [B / group, H, W]."""
        masks: dict[int, Tensor] = {}
        for (uuid, picture), maps in self.maps.items():
            threshold = self.edited[uuid].prompt_to_prompt.threshold
            mask = blend_mask(maps.unbind(dim=1), self.size, threshold)
            masks[picture] = mask | masks.get(picture, mask)
        return masks

    def blended(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> the same where outside its mask an edit is its source."""
        masks = self.masks()
        latents = latents.clone() if masks else latents
        for picture, mask in masks.items():
            source, edited = latents[:: self.group], latents[picture :: self.group]
            latents[picture :: self.group] = blend_latents(source, edited, mask.to(latents.device))
        return latents


def common_group(edited: Sequence[EditedConditioning], batch: int) -> int:
    """How many pictures belong together: a source and its edits; 1 without Prompt-to-Prompt Edit.

    Args:
        batch: how many pictures are drawn.

    Raises:
        ValueError: they do not come out even, or a conditioning was changed behind Prompt-to-Prompt Edit.
    """
    pairings = [(each, each.prompt_to_prompt) for each in edited if each.prompt_to_prompt]
    groups = {edit.group_size for _, edit in pairings}
    if len(groups) > 1:
        raise ValueError(
            f"Prompt-to-Prompt Edits of {' and '.join(map(str, sorted(groups)))} pictures are combined in one sampler: "
            "give each the same number of edited conditionings."
        )
    group = groups.pop() if groups else 1
    if batch % group:
        raise ValueError(
            f"The sampler draws {batch} picture(s), but Prompt-to-Prompt Edit needs {group} side by side, the source "
            "and its edits: connect its latent output to the sampler."
        )
    for each, edit in pairings:
        tokens = len(edit.images[0].steps)
        if (each.rows, each.tokens) != (group, tokens):
            raise ValueError(
                f"The conditioning of Prompt-to-Prompt Edit had {group} rows of {tokens} tokens and now has "
                f"{each.rows} of {each.tokens}: join or average conditionings before that node, not behind it."
            )
    return group


def attention_blocks(unet: UNetModel) -> list[tuple[str, int]]:
    """The host's names of a U-Net's blocks."""
    return [
        *[("input", index) for index in range(len(unet.input_blocks))],
        ("middle", 0),
        *[("output", index) for index in range(len(unet.output_blocks))],
    ]


def is_coarse(extra_options: dict) -> bool:
    """Whether a layer's map has a quarter of the latent's edges, or less; the U-Net rounds up where it halves."""
    latent, layer = extra_options["original_shape"][-2:], extra_options["activations_shape"][-2:]
    return all(edge <= math.ceil(whole / QUARTER) for edge, whole in zip(layer, latent, strict=True))
