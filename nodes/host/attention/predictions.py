"""Which predictions of a sampling run are the guider's own, told by the conditionings and not by their order.

In one call, a guider predicts each of its conditionings once. What is predicted again in the same call belongs to a
patch of the model: PAG predicts the positive once more with another self-attention, SAG the negative of a blurred
latent. Guiders give the host their conditionings in an order of their own, so that a number in ``cond_or_uncond`` does
not tell which is the positive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast
from uuid import UUID, uuid4

import comfy.samplers
from comfy.patcher_extension import WrapperExecutor, WrappersMP, add_wrapper_with_key
from torch import Tensor

KEY = "blip_predictions"  # of our wrappers

Conds = Sequence[list[dict[str, Any]] | None]  # the host's: entries of each conditioning that is predicted


class OwnPredictions:
    """Follows the predictions of one sampling run.

    Args:
        sides: The guider's name of the list, such as ``positive``, of each conditioning to be followed, by the host's
            id of it.

    Attributes:
        copies: Ids of copies that the host made of these conditionings for an area -> id of the conditioning.
        ids: Ids of the conditionings that the model is called for now, if the guider itself asked for them.
        denoised: Id of a conditioning -> its prediction in this call of the guider, of shape [B, 4, h, w], together
            with everything else in its list.
    """

    def __init__(self, sides: Mapping[UUID, str]) -> None:
        self.sides = sides
        self.copies: dict[UUID, UUID] = {}
        self.ids: frozenset[UUID] = frozenset()
        self.denoised: dict[UUID, Tensor] = {}

    def install(self, model_options: dict[str, Any]) -> None:
        """Add the wrappers to the options of a run.

        Args:
            model_options: The guider's options, which are its own copy.
        """
        for wrapper_type, wrapper in (
            (WrappersMP.SAMPLER_SAMPLE, self.sampler_sample),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.CALC_COND_BATCH, self.calc_cond_batch),
        ):
            add_wrapper_with_key(wrapper_type, KEY, wrapper, model_options, is_model_options=True)

    # What the host calls, from the outside in.

    def sampler_sample(self, executor: WrapperExecutor, guider: comfy.samplers.CFGGuider, *args: Any) -> Tensor:
        """Wrap the sampler: tell apart the copies of conditionings that the host has made by now.

        Where only one side has an area, the other gets a copy of that entry, with its id but with its own prompt.

        Args:
            executor: What the host would have called.
            guider: Guider of the run.
            *args: Further arguments, which are passed on.

        Returns:
            Sampled latents of shape [B, 4, h, w].
        """
        entries = [(side, entry) for side, entries in guider.conds.items() for entry in entries]
        uses = Counter(entry["uuid"] for _, entry in entries)
        owners = {
            id(prompt_of(entry)): entry["uuid"] for side, entry in entries if self.sides.get(entry["uuid"]) == side
        }
        for _, entry in entries:
            owner = owners.get(id(prompt_of(entry)))
            if owner == (entry["uuid"] if entry["uuid"] in self.sides else None):
                continue
            if uses[entry["uuid"]] > 1:
                entry["uuid"] = uuid4()
            if owner is not None:
                self.copies[entry["uuid"]] = owner
        return executor(guider, *args)

    def predict_noise(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
        """Wrap a call of the guider, in which nothing is predicted yet.

        Args:
            executor: What the host would have called.
            *args: The host's arguments, which are passed on.
            **kwargs: Further arguments, which are passed on.

        Returns:
            The guider's prediction of the denoised latents, of shape [B, 4, h, w].
        """
        self.denoised = {}
        return executor(*args, **kwargs)

    def calc_cond_batch(self, executor: WrapperExecutor, model: Any, conds: Conds, *args: Any) -> list[Tensor]:
        """Wrap the predictions of some conditionings.

        Args:
            executor: What the host would have called.
            model: The host's model.
            conds: Entries of each conditioning.
            *args: Further arguments, which are passed on.

        Returns:
            For each conditioning a prediction of shape [B, 4, h, w].
        """
        ids = [[entry["uuid"] for entry in entries or ()] for entries in conds]
        outer, self.ids = self.ids, frozenset(each for side in ids for each in side if each not in self.denoised)
        try:
            predicted = cast(list[Tensor], executor(model, conds, *args))
            for side, denoised in zip(ids, predicted, strict=True):
                self.denoised |= {each: denoised.clone() for each in side if each in self.ids}
        finally:
            self.ids = outer
        return predicted


def prompt_of(entry: dict[str, Any]) -> Any:
    """Return the host's object for the prompt of an entry, which copies share; None without a prompt."""
    return entry["model_conds"].get("c_crossattn")
