"""Edits of attention travel with a conditioning, without a MODEL wire, and come into force when it is sampled with.

A hook of the host carries them into the sampler. There they are taken off the conditionings before anything is drawn:
the host runs conditionings with different hooks one after the other, and positive and negative are to stay one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import comfy.hooks
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....blip_qformer.attention.edits import Edit, Reweight
from ..checks import require_sd15
from ..conditioning import Conditioning
from .sampling_run import AttentionRun, EditedConditioning

#: Parts of the names of the host's samplers that add noise of their own.
NOISY_SAMPLERS = ("ancestral", "sde", "ddpm", "lcm")


#: Key of a conditioning's dictionary for its edits, and name of the hook that brings them to the sampler.
EDITS = "blip_attention_edits"


def edits_of(conditioning: Conditioning) -> list[tuple[Edit, ...]]:
    """The edits that each entry of a conditioning carries."""
    return [options.get(EDITS, ()) for _, options in conditioning]


def with_edits(conditioning: Conditioning, edits: Sequence[Sequence[Edit]]) -> Conditioning:
    """A conditioning whose entries carry these edits, and no others, beside whatever hooks they have."""
    hook = comfy.hooks.TransformerOptionsHook({"wrappers": {WrappersMP.OUTER_SAMPLE: {EDITS: [sample_with_edits]}}})
    hook.hook_ref = EDITS  # the host compares hooks by this: ours are all one, however many conditionings bring it
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)
    marked = [
        [tensor, {**options, EDITS: tuple(each)}] for (tensor, options), each in zip(conditioning, edits, strict=True)
    ]
    return comfy.hooks.set_hooks_for_conditioning(marked, hooks)


def sample_with_edits(
    executor: Callable, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Around a whole run of the host's sampler; what the run needs to remember is made here and gone with it.

    Raises:
        ValueError: the model is not SD1.5, or the latents are not those that the edits were made for.
    """
    guider = executor.class_obj
    edited = take_edits(guider)
    if not edited:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    require_sd15(guider.model_patcher)
    if any(edit.source_unguided for each in edited.values() if (edit := each.prompt_to_prompt)):
        check_adds_no_noise(noise, sampler)
    run = AttentionRun(edited, noise, sigmas.tolist())
    run.install(guider)
    return run.finish(executor(noise, latent_image, sampler, sigmas, *args, **kwargs))


def take_edits(guider: comfy.samplers.CFGGuider) -> dict[UUID, EditedConditioning]:
    """Take edits and hook off the conditionings of a run, so that they are batched as without them."""
    edited: dict[UUID, EditedConditioning] = {}
    for side, entries in guider.conds.items():
        for entry in entries:
            if edits := entry.pop(EDITS, ()):
                rows, tokens, _ = entry["cross_attn"].shape
                fitting = [each.padded(tokens) if isinstance(each, Reweight) else each for each in edits]
                edited[entry["uuid"]] = EditedConditioning(side, tuple(fitting), rows, tokens)
    take_off_hook(guider, EDITS)
    return edited


def take_off_hook(guider: comfy.samplers.CFGGuider, hook_ref: str) -> None:
    """Take a hook of ours off the conditionings of a run; those with the same hooks left share one group again.

    The host runs conditionings of different groups one after the other.
    """
    groups: dict[frozenset, comfy.hooks.HookGroup] = {}
    for entry in (entry for entries in guider.conds.values() for entry in entries):
        others = [hook for hook in getattr(entry.pop("hooks", None), "hooks", ()) if hook.hook_ref != hook_ref]
        if others:
            # Hooks of one reference may have strengths of their own, by their keyframes.
            key = frozenset((hook, id(hook.hook_keyframe)) for hook in others)
            entry["hooks"] = groups.setdefault(key, hook_group(others))
    # The host had counted ours when it chose to cache the hooks' weights; it puts its choice back after the run.
    if comfy.samplers.get_total_hook_groups_in_conds(guider.conds) <= 1:
        guider.model_patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram


def hook_group(hooks: Sequence[comfy.hooks.Hook]) -> comfy.hooks.HookGroup:
    """Hooks as the host keeps them."""
    group = comfy.hooks.HookGroup()
    for hook in hooks:
        group.add(hook)
    return group


def check_adds_no_noise(noise: Tensor, sampler: Any) -> None:
    """Refuse to draw a photograph again where noise is added to it.

    Raises:
        ValueError: the sampler starts from noise, or adds some at each step.
    """
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    if any(part in name for part in NOISY_SAMPLERS):
        raise ValueError(
            f"{name.removeprefix('sample_')} adds noise at every step, so that the photograph does not come back: "
            "choose ddim, or switch source_unguided off in Prompt-to-Prompt Edit."
        )
    if noise.any():
        raise ValueError(
            "This sampler adds noise to the latent of DDIM Inversion, so that the photograph does not come back: use "
            "KSampler (Advanced) with add_noise disabled, or switch source_unguided off in Prompt-to-Prompt Edit."
        )
