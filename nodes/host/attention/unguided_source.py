"""The source of Prompt-to-Prompt Edit without guidance: what DDIM inversion inverted, whatever guides the edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from uuid import UUID

import comfy.samplers
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from .predictions import OwnPredictions

#: Root mean square, in units of the noise, up to which two predictions of the same differ by rounding alone.
ROUNDING = 1e-4
ROUNDING_OF_HALF = 1e-2  # where the U-Net computes in 16 bits


class UnguidedSource:
    """Puts the sources' conditional prediction in the place of the guided one that leaves the guider.

    Args:
        conditionings: The host's ids of the conditionings whose sources are unguided; the first one's list counts.
        predictions: Predictions of the run.
        group_size: Number of images in a group, a source and its edited images.
        guider: Guider of the run, before this pack adds its own patches.
    """

    def __init__(
        self,
        conditionings: Sequence[UUID],
        predictions: OwnPredictions,
        group_size: int,
        guider: comfy.samplers.CFGGuider,
    ) -> None:
        self.conditionings = conditionings
        self.predictions = predictions
        self.group_size = group_size
        self.is_mixed = True if can_mix_conditionings(guider) else None  # None: not known before the first step

    def predict_noise(self, executor: WrapperExecutor, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the guider, and replace what it predicts for the sources.

        Args:
            executor: What the host would have called; its ``class_obj`` is the guider.
            x: Latents of shape [B, 4, h, w].
            sigma: Noise level of each row, of shape [B].
            *args: Further arguments, of which the first are the options of the model.
            **kwargs: The same.

        Returns:
            Prediction of the denoised latents, of shape [B, 4, h, w].

        Raises:
            ValueError: The guider did not predict the sources' conditioning for all images at once.
        """
        denoised = executor(x, sigma, *args, **kwargs)
        if not self.conditionings:
            return denoised
        conditional = self.predictions.denoised.get(self.conditionings[0])
        if conditional is None or conditional.shape != denoised.shape:
            raise ValueError(
                "This sampler's guider, or a node on its MODEL, does not predict the source's prompt for all pictures "
                "at once, so that the unguided source is not known: use another sampler node, or switch "
                "source_unguided off in Prompt-to-Prompt Edit."
            )
        guider = cast(comfy.samplers.CFGGuider, executor.class_obj)
        model_options = args[0] if args else kwargs["model_options"]
        conditional = self._unmixed(guider, conditional, x, sigma, model_options)
        denoised = denoised.clone()
        denoised[:: self.group_size] = conditional[:: self.group_size]
        return denoised

    def _unmixed(
        self, guider: comfy.samplers.CFGGuider, conditional: Tensor, x: Tensor, sigma: Tensor, model_options: dict
    ) -> Tensor:
        """The prediction [B, 4, h, w] of the sources' conditioning alone.

        A patch such as NAG guides inside the U-Net, where positive and negative are one batch. So behind any patch the
        conditioning is predicted once more, in a batch of its own: how much the patch mixes changes from step to step.
        Without one, the first step tells whether the network mixes in a way that cannot be seen.
        """
        entries = next(
            entries
            for entries in guider.conds.values()
            if any(entry["uuid"] == self.conditionings[0] for entry in entries)
        )
        is_batched = self.predictions.denoised.keys() > {entry["uuid"] for entry in entries}
        if self.is_mixed is False or not is_batched:
            return conditional
        (alone,) = comfy.samplers.calc_cond_batch(guider.inner_model, [entries], x, sigma, model_options)
        if self.is_mixed is None:
            difference = (alone - conditional)[:: self.group_size].square().mean().sqrt()
            dtype = guider.inner_model.manual_cast_dtype or guider.inner_model.get_dtype()
            self.is_mixed = bool(difference > (ROUNDING if dtype.itemsize > 2 else ROUNDING_OF_HALF) * sigma.max())
        return alone if self.is_mixed else conditional


def can_mix_conditionings(guider: comfy.samplers.CFGGuider) -> bool:
    """Return whether something on the MODEL acts inside the U-Net, where it could mix positive and negative.

    Args:
        guider: Guider of a run.
    """
    model_options, patcher = guider.model_options, guider.model_patcher
    options = model_options["transformer_options"]
    wrappers = options.get("wrappers", {})
    return bool(
        any(options.get("patches", {}).values())
        or any(options.get("patches_replace", {}).values())
        or "optimized_attention_override" in options
        or "model_function_wrapper" in model_options
        or any(wrappers.get(kind) for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL))
        or any(name.startswith("diffusion_model") for name in patcher.object_patches)
        or patcher.injections
    )
