"""One sampling run with edited attention: the host's wrappers and patches, carried out by functions on tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast
from uuid import UUID

import comfy.samplers
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, add_wrapper_with_key
from torch import Tensor

from ....blip_qformer.attention.edits import PromptToPrompt, regions_of
from ....blip_qformer.attention.injection import ConditioningRows, attend_twice, edit_cross, inject_self
from ....blip_qformer.attention.plan import StepPlan, can_need_two_attentions, plan_step
from ....blip_qformer.attention.schedule import step_of
from .edited_conditioning import EditedConditioning, common_group_size
from .layers import ExtraOptions, conditioning_rows, is_coarse, require_known_rows, unet_blocks
from .local_blend import LocalBlend
from .predictions import OwnPredictions
from .regions import RUN_REGIONS, RunRegions
from .unguided_source import UnguidedSource

KEY = "blip_attention"  # of our wrappers


class AttentionRun:
    """What one sampling run does to attention, and the state that it needs for that.

    Args:
        edited: Edited conditionings by the host's id of each.
        noise: Noise that the run starts from, of shape [B, 4, h, w].
        sigmas: Noise levels of the schedule, falling, one more than there are steps.
        guider: Guider of the run.

    Raises:
        ValueError: If the batch does not consist of the images that belong together.
    """

    def __init__(
        self,
        edited: dict[UUID, EditedConditioning],
        noise: Tensor,
        sigmas: Sequence[float],
        guider: comfy.samplers.CFGGuider,
    ) -> None:
        height, width = noise.shape[-2:]
        self.group_size = common_group_size(list(edited.values()), len(noise))
        self.batch_size = len(noise)
        self.edited = edited
        self.sigmas = sigmas
        self.local_blend = LocalBlend(edited, self.batch_size, self.group_size, (height, width))
        self.predictions = OwnPredictions({uuid: each.side for uuid, each in edited.items()})
        unguided = [uuid for uuid, each in edited.items() if (edit := each.prompt_to_prompt) and edit.source_unguided]
        self.unguided_source = UnguidedSource(unguided, self.predictions, self.group_size, guider)
        self.regions = RunRegions(guider, edited, (height, width), self.batch_size, self.group_size)
        self.step = -1
        self.plans: dict[UUID, StepPlan] = {}

    @property
    def prompt_to_prompts(self) -> list[PromptToPrompt]:
        """Edits of the run that make images follow a source."""
        return [edit for each in self.edited.values() if (edit := each.prompt_to_prompt) is not None]

    @property
    def has_regions(self) -> bool:
        """Whether a conditioning of the run has regions with prompts of their own."""
        return any(regions_of(each.edits) for each in self.edited.values())

    def install(self, guider: comfy.samplers.CFGGuider) -> None:
        """Add what this run needs to the options of the run, patches in front of those of other packs.

        Args:
            guider: Guider of the run, whose model options are its own copy.
        """
        model_options: dict[str, Any] = guider.model_options
        options = model_options["transformer_options"]
        patches = options.setdefault("patches", {})
        patches["attn2_patch"] = [self.patch_cross, *patches.get("attn2_patch", [])]
        if self.prompt_to_prompts:
            patches["attn1_patch"] = [self.patch_self, *patches.get("attn1_patch", [])]
        replaces = any(edit.has_local_blend or can_need_two_attentions(edit) for edit in self.prompt_to_prompts)
        if self.has_regions:
            options[RUN_REGIONS] = self.regions
        if replaces or self.has_regions:
            replaced = options.setdefault("patches_replace", {}).setdefault("attn2", {})
            for block in {*unet_blocks(self.regions.unet), *replaced}:
                replaced[block] = partial(self.replace_cross, replaced.get(block))
        self.predictions.install(model_options)
        for wrapper_type, wrapper in (
            (WrappersMP.SAMPLER_SAMPLE, self.sampler_sample),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
        ):
            add_wrapper_with_key(wrapper_type, KEY, wrapper, model_options, is_model_options=True)

    def finish(self, samples: Tensor) -> Tensor:
        """Return the latents [B, 4, h, w] that the sampler ended with, blended after the last step too."""
        return self.local_blend.finish(samples)

    # What the host calls, from the outside in.

    def sampler_sample(self, executor: WrapperExecutor, guider: comfy.samplers.CFGGuider, *args: Any) -> Tensor:
        """Wrap the sampler: find the edited conditionings again among the copies that the host has made by now.

        Args:
            executor: What the host would have called; its ``class_obj`` is the sampler.
            guider: Guider of the run.
            *args: Further arguments, which are passed on.

        Returns:
            Sampled latents of shape [B, 4, h, w].
        """
        self.local_blend.choose_sampler(cast(comfy.samplers.Sampler, executor.class_obj))
        self.edited |= {copy: self.edited[uuid] for copy, uuid in self.predictions.copies.items()}
        return executor(guider, *args)

    def predict_noise(self, executor: WrapperExecutor, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Wrap a call of the guider: plan the step, keep the sources unguided, and apply local blend before and after.

        Args:
            executor: What the host would have called.
            x: Latents of shape [B, 4, h, w].
            sigma: Noise level of each row, of shape [B].
            *args: Further arguments, which are passed on.
            **kwargs: Further arguments, which are passed on.

        Returns:
            Prediction of the denoised latents, of shape [B, 4, h, w].
        """
        step = step_of(float(sigma.max()), self.sigmas)
        if step != self.step:
            self.step, num_steps = step, len(self.sigmas) - 1
            self.plans = {uuid: plan_step(each.edits, step, num_steps, x.device) for uuid, each in self.edited.items()}
            self.regions.plans = self.plans

        def predict(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.unguided_source.predict_noise(executor, x, *args, **kwargs)

        return self.local_blend.predict_noise(predict, x, sigma, *args, **kwargs)

    def patch_self(
        self, query: Tensor, context: Tensor, values: Tensor, extra_options: ExtraOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inject the sources' self-attention; an ``attn1_patch``.

        Args:
            query: Hidden states that queries are projected from, of shape [B, h * w, C].
            context: Hidden states that keys are projected from, of shape [B, h * w, C].
            values: Hidden states that values are projected from, of shape [B, h * w, C].
            extra_options: What the host tells a patch.

        Returns:
            The three hidden states, edited.
        """
        planned = self.planned_rows(query, extra_options)
        if any(plan.injects_self for _, plan in planned) and is_coarse(extra_options):
            context = inject_self(context, planned)
            query = inject_self(query, planned)
        return query, context, values

    def patch_cross(
        self, query: Tensor, context: Tensor, values: Tensor, extra_options: ExtraOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply those edits of a cross-attention that one attention can do; an ``attn2_patch``.

        Args:
            query: Hidden states that queries are projected from, of shape [B, h * w, C].
            context: Prompt that keys are projected from, of shape [B, T, C'].
            values: Prompt that values are projected from, of shape [B, T, C'].
            extra_options: What the host tells a patch.

        Returns:
            Hidden states and prompts, edited.
        """
        planned = self.planned_rows(query, extra_options)
        self.regions.prompt_length = context.shape[1]
        if any(plan.regions for _, plan in planned):  # replace_cross edits the attention of each region by itself
            return query, context, values
        return edit_cross(query, context, values, planned)

    def replace_cross(
        self, other: Callable | None, query: Tensor, key: Tensor, values: Tensor, extra_options: ExtraOptions
    ) -> Tensor:
        """Compute a cross-attention, twice or by regions where it is needed, and note where blend words attend.

        Args:
            other: Another pack's replacement of this attention, if there is one.
            query: Projected queries of shape [B, h * w, C].
            key: Projected keys of shape [B, T, C].
            values: Projected values of shape [B, T, C].
            extra_options: What the host tells a patch.

        Returns:
            Output of the attention, of shape [B, h * w, C].
        """

        def attend(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
            heads, precision = extra_options["n_heads"], extra_options["attn_precision"]
            return optimized_attention(
                query, key, values, heads, attn_precision=precision, transformer_options=extra_options
            )

        def attend_all(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
            return other(query, key, values, extra_options) if other else attend(query, key, values)

        planned = [(uuid, rows, self.plans[uuid]) for uuid, rows in self.edited_rows(len(query), extra_options)]
        own = [each for each in planned if each[0] in self.predictions.ids]
        self.local_blend.add_maps(query, key, own, extra_options)
        if any(plan.regions for _, _, plan in planned):
            return self.regions.attend(query, key, values, extra_options, attend, attend_all if other else None)
        if any(plan.needs_two_attentions for _, _, plan in planned):
            return attend_twice(query, key, values, [(rows, plan) for _, rows, plan in planned], attend, attend_all)
        return attend_all(query, key, values)

    # Which rows of a call are edited, and how.

    def planned_rows(self, query: Tensor, extra_options: ExtraOptions) -> list[tuple[ConditioningRows, StepPlan]]:
        """Return the edited rows of a call and what is planned for them in this step."""
        return [(rows, self.plans[uuid]) for uuid, rows in self.edited_rows(len(query), extra_options)]

    def edited_rows(self, batch_size: int, extra_options: ExtraOptions) -> list[tuple[UUID, ConditioningRows]]:
        """Return which rows of a call belong to which edited conditioning.

        Args:
            batch_size: Number of rows in the call.
            extra_options: What the host tells a patch.

        Raises:
            ValueError: If the rows are not those of the sampler.
        """
        require_known_rows(batch_size, extra_options)
        count = len(extra_options["sigmas"])
        if self.group_size > 1 and count != self.batch_size:  # a window may begin in the middle of a group
            raise ValueError(
                f"The model was called with {count} of the sampler's {self.batch_size} pictures, but Prompt-to-Prompt "
                f"Edit needs its {self.group_size} side by side: take out what draws the batch in windows."
            )
        return [
            (uuid, ConditioningRows(rows.start, rows.stop, self.group_size))
            for uuid, rows in conditioning_rows(batch_size, extra_options)
            if uuid in self.edited
        ]
