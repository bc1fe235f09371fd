"""Edits of attention travel in a conditioning, and take effect in the sampler it comes to.

From the edit node to the first edited step, in the order in which the host calls:

1. An edit node stores its edits in the entries of a conditioning, under ``EDITS`` (:func:`set_edits`). The wrapper that
   reads them travels in a hook of the conditioning or in a MODEL (:mod:`.carrier`). Whatever other nodes do to the
   conditioning, it keeps both.
2. The sampler node runs ``CFGGuider.sample``. It copies the conditionings, registers their hooks and calls the wrapper,
   of type ``OUTER_SAMPLE``: :func:`sample_with_edits`.
3. Edits and hook are removed from these copies (:func:`detach_edits`). The model and the sampler are checked, and an
   :class:`~.sampling_run.AttentionRun`, the state of this run, adds its patches and wrappers to the options of the run.
4. The host gives each conditioning its areas, masks and ControlNets, and calls the wrapper of type ``SAMPLER_SAMPLE``,
   ``AttentionRun.sampler_sample``, which finds the edited conditionings again among the copies that this made.
5. The sampler calls the guider for the first step. The wrapper of type ``PREDICT_NOISE``,
   ``AttentionRun.predict_noise``, plans the step (:func:`blip_qformer.attention.plan.plan_step`), and puts the source's
   own prediction in the place of the guided one where it is to be unguided (:mod:`.unguided_source`). Which predictions
   are whose, and which the guider made for itself, is told by :mod:`.predictions`.
6. Each attention layer of the U-Net calls ``AttentionRun.patch_self``, ``patch_cross`` or ``replace_cross``, which
   apply the plan to queries, keys and values (:mod:`blip_qformer.attention.injection`), and attend to the prompts of
   regions (:mod:`.regions`). This is the first edited step.
7. After the last step ``AttentionRun.finish`` applies local blend once more, and the run is forgotten.

Record Attention goes the same way with a wrapper of its own, see :mod:`.recorder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from uuid import UUID

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ....blip_qformer.attention.edits import Edit, Reweight, regions_of
from ..checks import require_sd15
from ..conditioning import Conditioning
from .carrier import attach, detach, wrap_model
from .edited_conditioning import EditedConditioning
from .sampler_probe import require_exact_sampler
from .sampling_run import AttentionRun
from .uncompiled import run_uncompiled

#: Key of a conditioning's dictionary for its edits, and reference of the hook that comes with them.
EDITS = "blip_attention_edits"


def get_edits(conditioning: Conditioning) -> list[tuple[Edit, ...]]:
    """Return the edits of each entry of a conditioning, in the order in which they were made."""
    return [options.get(EDITS, ()) for _, options in conditioning]


def set_edits(conditioning: Conditioning, edits: Sequence[Sequence[Edit]], *, in_model: bool = False) -> Conditioning:
    """Return a copy of a conditioning that carries edits, in place of those it had.

    Args:
        conditioning: Conditioning of any sampler node, with or without hooks of others.
        edits: Edits for each of its entries.
        in_model: Whether the sampler gets a MODEL from :func:`model_for_edits`.

    Returns:
        A conditioning of the same tensors; the given one stays as it is.
    """
    return attach(conditioning, EDITS, [tuple(each) for each in edits], sample_with_edits, in_model=in_model)


def model_for_edits(model: ModelPatcher | None) -> ModelPatcher | ExecutionBlocker:
    """Return a copy of a MODEL with which conditionings need no hook for their edits, see :func:`.wrap_model`.

    Raises:
        ValueError: The model is not SD1.5.
    """
    if model is not None:
        require_sd15(model)
    return wrap_model(model, EDITS, sample_with_edits)


def sample_with_edits(
    executor: WrapperExecutor,
    noise: Tensor,
    latent_image: Tensor,
    sampler: comfy.samplers.Sampler,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Wrap a whole sampling run of the host; all state of the run is created here.

    Args:
        executor: What the host would have called; its ``class_obj`` is the guider.
        noise: Noise of shape [B, 4, h, w].
        latent_image: Latents to start from, of shape [B, 4, h, w].
        sampler: Sampler of the host.
        sigmas: Noise levels of shape [steps + 1], falling.
        *args: Further arguments, which are passed on.
        **kwargs: Further arguments, which are passed on.

    Returns:
        Sampled latents of shape [B, 4, h, w].

    Raises:
        ValueError: If the model is not SD1.5, or the latents or the sampler are not those that the edits need.
    """
    guider = cast(comfy.samplers.CFGGuider, executor.class_obj)
    edited = detach_edits(guider)
    if not edited:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    require_sd15(guider.model_patcher)
    if any(edit.source_unguided for each in edited.values() if (edit := each.prompt_to_prompt)):
        require_no_added_noise(noise)
        require_exact_sampler(sampler, sigmas, guider.model_patcher)
    require_images_for_regions(edited, len(noise))
    run_uncompiled(guider.model_options)
    run = AttentionRun(edited, noise, sigmas.tolist(), guider)
    run.install(guider)
    return run.finish(executor(noise, latent_image, sampler, sigmas, *args, **kwargs))


def detach_edits(guider: comfy.samplers.CFGGuider) -> dict[UUID, EditedConditioning]:
    """Remove edits and hook from the conditionings of a run, so that these are batched as they would be without.

    Args:
        guider: Guider of the run, whose conditionings are its own copies.

    Returns:
        Edited conditionings by the host's id of each.
    """
    edited: dict[UUID, EditedConditioning] = {}
    for side, entry, edits in detach(guider, EDITS):
        if edits:
            rows, tokens, _ = entry["cross_attn"].shape
            padded = tuple(edit.padded(tokens) if isinstance(edit, Reweight) else edit for edit in edits)
            edited[entry["uuid"]] = EditedConditioning(side, padded, rows, tokens)
    return edited


def require_images_for_regions(edited: dict[UUID, EditedConditioning], batch_size: int) -> None:
    """Refuse a run that would leave out rows of a region's prompt.

    Args:
        edited: Edited conditionings of the run.
        batch_size: Number of images in the run.

    Raises:
        ValueError: If a region's prompt has more rows than there are images.
    """
    regions = [region for each in edited.values() for region in regions_of(each.edits)]
    rows = max((len(region.context) for region in regions), default=1)
    if rows > batch_size:
        raise ValueError(
            f"The sampler draws {batch_size} picture(s), but a prompt of Subject Regions needs {rows} side by side, "
            f"one for each subject: connect an Empty Latent Image with batch_size {rows}, or a single subject."
        )


def require_no_added_noise(noise: Tensor) -> None:
    """Refuse to reproduce a photograph where the sampler node adds noise to its latent.

    Args:
        noise: Noise that the run starts from, of shape [B, 4, h, w].

    Raises:
        ValueError: If the noise is not zero.
    """
    if noise.any():
        raise ValueError(
            "This sampler adds noise to the latent of DDIM Inversion, so that the photograph does not come back: use "
            "KSampler (Advanced) with add_noise disabled, or switch source_unguided off in Prompt-to-Prompt Edit."
        )
