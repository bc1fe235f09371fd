"""The plan of one step: which rows attend with their source's query and key, and to which values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .alignment import Alignment
from .edits import Edit, EditedImage, PromptToPrompt, Region, Reweight


@dataclass(frozen=True, eq=False)
class CrossPlan:
    """The cross-attention of an edited image.

    With Q, K of the source and Q', K' of the edited image, it is attend(Q, K, source_mapper @ V) +
    attend(Q', K', edited_factors * V), where V are the edited image's values.

    Args:
        source_mapper: Mapper of the source's attention, of shape [tokens, tokens]; None is the identity.
        edited_factors: Factors on the edited image's own attention, of shape [tokens]; None means that all attention is
            injected and the second call is not needed.
    """

    source_mapper: Tensor | None
    edited_factors: Tensor | None


@dataclass(frozen=True, eq=False)
class BlendPlan:
    """Columns of attention whose sums are the maps of an edited image's blend words.

    Args:
        source_columns: Columns for the source's attention, of shape [tokens, words].
        edited_columns: Columns for the edited image's own attention and the last of the words, of shape [tokens, 1];
            None if it adds nothing.
    """

    source_columns: Tensor
    edited_columns: Tensor | None


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What the edits of one conditioning do in one step.

    Args:
        value_factors: Pairs of an image's index in its group (None: all) and factors on its values, of shape [tokens].
        cross_plans: Image index -> plan of its cross-attention, where the source's is injected.
        blend_plans: Image index -> the maps that local blend needs.
        injects_self: Whether the source's self-attention is injected.
        regions: Regions that attend to prompts of their own; the rest of the plan is then that of the scene.
    """

    value_factors: tuple[tuple[int | None, Tensor], ...] = ()
    cross_plans: dict[int, CrossPlan] = field(default_factory=dict)
    blend_plans: dict[int, BlendPlan] = field(default_factory=dict)
    injects_self: bool = False
    regions: tuple[RegionPlan, ...] = ()

    @property
    def needs_two_attentions(self) -> bool:
        """Whether an image attends both as its source does and by itself."""
        return any(cross.edited_factors is not None for cross in self.cross_plans.values())


@dataclass(frozen=True, eq=False)
class RegionPlan:
    """What one region does in one step.

    Args:
        region: The region.
        context: Its prompt on the device of the plan, of shape [rows, tokens, width].
        plan: What the edits of its own prompt do.
    """

    region: Region
    context: Tensor
    plan: StepPlan


def plan_step(edits: Sequence[Edit], step: int, num_steps: int, device: torch.device) -> StepPlan:
    """Plan one step of a conditioning's edits.

    Args:
        edits: The edits, of which at most one is a :class:`~.edits.PromptToPrompt`.
        step: Number of the step, from 0 on.
        num_steps: Number of all steps.
        device: Device of the plan's tensors.

    Returns:
        What the edits do in this step.
    """
    value_factors: list[tuple[int | None, Tensor]] = []
    cross_plans: dict[int, CrossPlan] = {}
    blend_plans: dict[int, BlendPlan] = {}
    injects_self = False
    regions: list[RegionPlan] = []
    for edit in edits:
        if isinstance(edit, Reweight):
            if edit.steps.covers(step, num_steps):
                value_factors.append((edit.image, edit.factors.to(device)))
            continue
        if isinstance(edit, Region):
            if edit.steps.covers(step, num_steps):
                plan = plan_step(edit.edits, step, num_steps, device)
                regions.append(RegionPlan(edit, edit.context.to(device), plan))
            continue
        injects_self = edit.self_steps.covers(step, num_steps)
        for index, image in enumerate(edit.images, start=1):
            cross = plan_cross(image.alignment, cross_replace_alpha(image, step, num_steps))
            if cross is not None:
                cross_plans[index] = CrossPlan(_to(device, cross.source_mapper), _to(device, cross.edited_factors))
            if image.has_local_blend:
                blend = plan_blend(image, cross)
                blend_plans[index] = BlendPlan(blend.source_columns.to(device), _to(device, blend.edited_columns))
    return StepPlan(tuple(value_factors), cross_plans, blend_plans, injects_self, tuple(regions))


def cross_replace_alpha(image: EditedImage, step: int, num_steps: int) -> Tensor:
    """Return how much of the source's attention is injected at each token, as in the paper's published code.

    Args:
        image: An edited image.
        step: Number of the step, from 0 on.
        num_steps: Number of all steps.

    Returns:
        A tensor of shape [tokens]: 1 inside a token's range of steps, 0 outside and for new tokens.
    """
    is_inside = torch.tensor([steps.covers(step, num_steps) for steps in image.steps])
    return (is_inside & image.alignment.has_source).float()


def plan_cross(alignment: Alignment, alpha: Tensor) -> CrossPlan | None:
    """Plan A_edited[:, j] = alpha_j (A_source mapper)[:, j] + (1 - alpha_j) A_edited[:, j], in closed form.

    Args:
        alignment: Alignment of the source's and the edited prompt.
        alpha: How much of the source's attention is injected at each token, of shape [tokens].

    Returns:
        The plan; None if nothing is injected.
    """
    if not alpha.any():
        return None
    if alpha.all() and alignment.is_identity:
        return CrossPlan(source_mapper=None, edited_factors=None)
    return CrossPlan(alignment.mapper * alpha, edited_factors=None if bool((alpha == 1).all()) else 1 - alpha)


def plan_blend(image: EditedImage, cross: CrossPlan | None) -> BlendPlan:
    """Plan the maps of an edited image's blend words.

    Args:
        image: An image with local blend.
        cross: The plan of its cross-attention in this step; None if nothing is injected.

    Returns:
        The columns of attention that make up the maps.
    """
    source_columns: list[Tensor] = []
    edited_columns: Tensor | None = None
    if image.source_words is not None:
        source_columns.append(image.source_words)
    if image.edited_words is not None:
        words = image.edited_words
        if cross is None:  # the attention is all the image's own
            source_columns.append(torch.zeros_like(words))
            edited_columns = words[:, None]
        else:
            source_columns.append(words if cross.source_mapper is None else cross.source_mapper @ words)
            edited_columns = None if cross.edited_factors is None else (cross.edited_factors * words)[:, None]
    return BlendPlan(torch.stack(source_columns, dim=-1), edited_columns)


def can_need_two_attentions(edit: PromptToPrompt) -> bool:
    """Whether there may be a step in which the source's attention is injected at some tokens and not at others.

    Args:
        edit: An edit.
    """
    return any(not image.alignment.has_source.all() or len(set(image.steps)) > 1 for image in edit.images)


def _to(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
