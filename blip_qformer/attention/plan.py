"""The row plan of one step: who lends query and key to whom, and which values each row attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .alignment import Alignment
from .edits import Edit, EditedPicture, PromptToPrompt, Reweight


@dataclass(frozen=True, eq=False)
class CrossPlan:
    """A picture's attention on the prompt: attend(Q, K of the source, lent @ V) + attend(Q, K of its own, own * V).

    Args:
        lent: [tokens, tokens]; None: the values as they are.
        own: [tokens]; None: the second attention is not needed, because everything is lent.
    """

    lent: Tensor | None
    own: Tensor | None


@dataclass(frozen=True, eq=False)
class BlendPlan:
    """Where a picture's words look, as columns of the source's attention and of its own.

    Args:
        lent: [tokens, words]; own: [tokens, 1], for the last of the words; None: nothing of its own.
    """

    lent: Tensor
    own: Tensor | None


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What one conditioning's edits do in one step.

    Args:
        scales: (picture or None for all, [tokens]): factors on the values.
        crosses: by picture, where the source's attention on the prompt is taken over.
        blends: by picture, where local blend wants maps.
        injects_self: whether the source's self-attention is taken over.
    """

    scales: tuple[tuple[int | None, Tensor], ...] = ()
    crosses: dict[int, CrossPlan] = field(default_factory=dict)
    blends: dict[int, BlendPlan] = field(default_factory=dict)
    injects_self: bool = False

    @property
    def needs_two_attentions(self) -> bool:
        return any(cross.own is not None for cross in self.crosses.values())


def plan_step(edits: Sequence[Edit], step: int, steps: int, device: torch.device) -> StepPlan:
    """The plan of a conditioning's edits, of which at most one is a :class:`~.edits.PromptToPrompt`."""
    scales, crosses, blends, injects_self = [], {}, {}, False
    for edit in edits:
        if isinstance(edit, Reweight):
            if edit.steps.covers(step, steps):
                scales.append((edit.picture, edit.factors.to(device)))
            continue
        injects_self = edit.self_steps.covers(step, steps)
        for number, picture in enumerate(edit.pictures, start=1):
            cross = plan_cross(picture.alignment, shares(picture, step, steps))
            if cross is not None:
                crosses[number] = CrossPlan(*_to(device, cross.lent, cross.own))
            if picture.is_blended:
                plan = plan_blend(picture, cross)
                blends[number] = BlendPlan(*_to(device, plan.lent, plan.own))
    return StepPlan(tuple(scales), crosses, blends, injects_self)


def shares(picture: EditedPicture, step: int, steps: int) -> Tensor:
    """How much of the source's attention each token takes over: 1 inside its part of the steps, 0 if it is new."""
    inside = torch.tensor([steps_of_token.covers(step, steps) for steps_of_token in picture.steps])
    return (inside & picture.alignment.has_source).float()


def plan_cross(alignment: Alignment, share: Tensor) -> CrossPlan | None:
    """A_edit[:, j] = share_j (A_source mapper)[:, j] + (1 - share_j) A_edit[:, j], in closed form.

    Args:
        share: [tokens]

    Returns:
        None: nothing is taken over.
    """
    if not share.any():
        return None
    if share.all() and alignment.is_identity:
        return CrossPlan(lent=None, own=None)
    lent = alignment.mapper * share
    return CrossPlan(lent, own=None if bool((share == 1).all()) else 1 - share)


def plan_blend(picture: EditedPicture, cross: CrossPlan | None) -> BlendPlan:
    """The columns whose sum is where a picture's words look, its attention being what ``cross`` makes it."""
    lent, own = [], None
    if picture.source_words is not None:
        lent.append(picture.source_words)
    if picture.edited_words is not None:
        words = picture.edited_words
        if cross is None:
            lent.append(torch.zeros_like(words))
            own = words[:, None]
        else:
            lent.append(words if cross.lent is None else cross.lent @ words)
            own = None if cross.own is None else (cross.own * words)[:, None]
    return BlendPlan(torch.stack(lent, dim=-1), own)


def can_need_two_attentions(edit: PromptToPrompt) -> bool:
    """Whether in some step a part of the tokens takes over the source's attention and a part does not."""
    return any(not picture.alignment.has_source.all() or len(set(picture.steps)) > 1 for picture in edit.pictures)


def _to(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.to(device) for tensor in tensors]
