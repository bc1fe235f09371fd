"""A step's plan applied to the tensors of one attention layer; no function changes its inputs in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .plan import StepPlan
from .values import map_values, scale_values

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, values, each [B, N, heads * d] -> [B, N, heads * d]


class ConditioningRows(NamedTuple):
    """The rows of a batch that belong to one conditioning: groups of a source and its edited images.

    Args:
        start: The first row.
        stop: The row behind the last.
        group_size: Number of images in a group.
    """

    start: int
    stop: int
    group_size: int

    def of(self, image: int | None) -> slice:
        """Return the rows of one image of every group.

        Args:
            image: Index of the image in its group, 0 being the source; None means all rows.
        """
        return slice(self.start + (image or 0), self.stop, 1 if image is None else self.group_size)


PlannedRows = Sequence[tuple[ConditioningRows, StepPlan]]


def inject_self(hidden_states: Tensor, planned: PlannedRows) -> Tensor:
    """Replace the edited images' input to the queries and keys of a self-attention by their source's.

    A_edited = A_source, applied to the edited image's own values: these are not computed from the result.

    Args:
        hidden_states: Input of the layer, of shape [B, N, C].
        planned: The edited rows of the batch and what is planned for them.

    Returns:
        The input to queries and keys, of the same shape.
    """
    injected = hidden_states.clone()
    for rows, plan in planned:
        if plan.injects_self:
            for image in range(1, rows.group_size):
                injected[rows.of(image)] = hidden_states[rows.of(0)]
    return injected


def edit_cross(query: Tensor, key: Tensor, values: Tensor, planned: PlannedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Apply every edit of a cross-attention that one call of the attention can do.

    All tensors may be those before the projections or those behind them.

    Args:
        query: Queries of shape [B, N, C].
        key: Keys of shape [B, T, C'].
        values: Values of shape [B, T, C'].
        planned: The edited rows of the batch and what is planned for them.

    Returns:
        Query, key and values of the same shapes.
    """
    if any(plan.value_factors or plan.cross_plans for _, plan in planned):
        values = values.clone()
    if any(plan.cross_plans for _, plan in planned):
        query, key = query.clone(), key.clone()
    for rows, plan in planned:
        for image, factors in plan.value_factors:
            values[rows.of(image)] = scale_values(values[rows.of(image)], factors)
        for image, cross in plan.cross_plans.items():
            if cross.edited_factors is None:
                query[rows.of(image)] = query[rows.of(0)]
                key[rows.of(image)] = key[rows.of(0)]
                if cross.source_mapper is not None:
                    values[rows.of(image)] = map_values(values[rows.of(image)], cross.source_mapper)
    return query, key, values


def attend_twice(
    query: Tensor, key: Tensor, values: Tensor, planned: PlannedRows, attend: Attend, attend_all: Attend | None = None
) -> Tensor:
    """Compute a cross-attention in which some rows attend with their source's query and key and with their own.

    This is the refinement of arXiv 2208.01626, section 3.2, see :class:`~.plan.CrossPlan`.

    Args:
        query: Projected queries of shape [B, N, C].
        key: Projected keys of shape [B, T, C].
        values: Projected values of shape [B, T, C].
        planned: The edited rows of the batch and what is planned for them.
        attend: The attention.
        attend_all: The attention for all rows, if it is another one.

    Returns:
        The output of the attention, of shape [B, N, C].
    """
    refined = [
        (rows.of(0), rows.of(image), cross.source_mapper, cross.edited_factors)
        for rows, plan in planned
        for image, cross in plan.cross_plans.items()
        if cross.edited_factors is not None and cross.source_mapper is not None
    ]
    own_values = values.clone()
    for _, image, _, edited_factors in refined:
        own_values[image] = scale_values(values[image], edited_factors, outside=0.0)
    attended = (attend_all or attend)(query, key, own_values)
    for source, image, source_mapper, _ in refined:
        attended[image] += attend(query[source], key[source], map_values(values[image], source_mapper))
    return attended
