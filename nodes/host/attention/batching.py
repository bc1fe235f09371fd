"""A source and its edits as one batch: conditionings joined row by row, latents repeated, masks kept for later."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....blip_qformer.attention.edits import PromptToPrompt
from ..conditioning import TOKEN_SPANS, Conditioning, stack_rows
from ..latents import Latent
from .hooks import EDITS
from .recorder import WATCHES

#: Key of a latent's dictionary for its :class:`EditMasks`; the host's samplers hand on what they do not know.
EDIT_MASKS = "blip_edit_masks"


OWN_KEYS = {"pooled_output", TOKEN_SPANS, EDITS}  # of a conditioning's dictionary: each picture may have its own


def join_pictures(source: Conditioning, edited: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of one row each -> one with a row for each picture; everything else is the source's.

    Raises:
        ValueError: they do not fit together.
    """
    for number, each in enumerate((source, *edited)):
        check_fits(each, source, name="source" if number == 0 else "edited" if number == 1 else f"edited_{number}")
    joined = stack_rows([source, *edited])
    return [
        [tensor, {key: value for key, value in options.items() if key != TOKEN_SPANS}] for tensor, options in joined
    ]


def check_fits(conditioning: Conditioning, source: Conditioning, name: str) -> None:
    """Refuse a conditioning that cannot be drawn side by side with the source's.

    Raises:
        ValueError: in one sentence, why.
    """
    if len(conditioning) != len(source):
        raise ValueError(
            f"{name} is combined of {len(conditioning)} conditionings and source of {len(source)}: combine them behind "
            "this node, or with the same number."
        )
    for (tensor, options), (source_tensor, source_options) in zip(conditioning, source, strict=True):
        if any(isinstance(edit, PromptToPrompt) for edit in options.get(EDITS, ())):
            raise ValueError(
                f"{name} comes from another Prompt-to-Prompt Edit: connect all edited conditionings to one such node."
            )
        if len(tensor) != 1:
            raise ValueError(
                f"{name} has {len(tensor)} rows, but each picture of the edit has one prompt: use a single subject, "
                'encoded as "one subject".'
            )
        if tensor.shape != source_tensor.shape:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens and source {source_tensor.shape[1]}: set overflow to truncate in "
                "Subject Prompt Compose, or make both prompts fill the same number of blocks of 77 tokens."
            )
        if WATCHES in {*options, *source_options}:
            raise ValueError(f"{name} or source comes from Record Attention: put that behind this node.")
        ours, theirs = _shared(options), _shared(source_options)
        if differing := [key for key in {*ours, *theirs} if not same_contents(ours.get(key), theirs.get(key))]:
            raise ValueError(
                f"{name} and source differ in {', '.join(sorted(differing))}, but one call draws both: apply "
                "ControlNets, areas, masks and hooks to the conditioning that comes out of this node."
            )


def repeat_with_source(latent: Latent, group: int, masks: EditMasks) -> Latent:
    """A latent of N pictures -> each ``group`` times, one behind the other, with the same noise.

    The host counts noise by ``batch_index``: equal numbers get equal noise.
    """
    samples = latent["samples"]
    repeated = {**latent, "samples": samples.repeat_interleave(group, dim=0), EDIT_MASKS: masks}
    numbers = latent.get("batch_index", range(len(samples)))
    repeated["batch_index"] = [number for number in numbers for _ in range(group)]
    if len(samples) > 1 and len(latent.get("noise_mask", ())) == len(samples):
        repeated["noise_mask"] = latent["noise_mask"].repeat_interleave(group, dim=0)
    return repeated


class EditMasks:
    """The masks of local blend of the last runs, found again by what was drawn in them.

    A node's outputs are kept and used in many runs, and two samplers may use them in one; so a mask does not belong to
    the node but to the latents that a run ended with.
    """

    RUNS = 8

    def __init__(self) -> None:
        self._runs: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.RUNS)

    def keep(self, samples: Tensor, masks: Tensor) -> None:
        """Called at the end of a run with the latents [B, C, H, W] and the masks [B', H, W]."""
        self._runs.appendleft((samples, masks))

    def of(self, samples: Tensor) -> Tensor | None:
        """The masks [B', H, W] of the run that drew these latents; None: they were not drawn with local blend."""
        return next((masks for drawn, masks in self._runs if torch.equal(drawn, samples.cpu())), None)


def same_contents(one: Any, other: Any) -> bool:
    """Whether two values are equal; tensors by their numbers, also in lists, tuples and dictionaries."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_contents(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_contents, one, other))
    return one == other


def _shared(options: dict[str, Any]) -> dict[str, Any]:
    """What pictures that are drawn by one call must have in common, hooks without the one that brings our edits."""
    group = options.get("hooks")
    foreign = {hook for hook in group.hooks if hook.hook_ref != EDITS} if group else set()
    return {**{key: value for key, value in options.items() if key not in OWN_KEYS}, "hooks": foreign}
