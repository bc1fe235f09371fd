"""The row plan at work on the tensors of one attention layer; all functions leave their inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .plan import StepPlan
from .values import map_values, scale_values

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, values, each [B, N, heads * d] -> [B, N, heads * d]


class PictureRows(NamedTuple):
    """The rows of a batch that belong to one conditioning: groups of a source and its edits, one behind the other."""

    start: int
    stop: int
    group: int

    def of(self, picture: int | None) -> slice:
        """The rows of one picture of every group; None: of all."""
        return slice(self.start + (picture or 0), self.stop, 1 if picture is None else self.group)


EditedRows = Sequence[tuple[PictureRows, StepPlan]]


def inject_self(places: Tensor, edited: EditedRows) -> Tensor:
    """What the queries and keys of a self-attention are made from, the edits' taken from their sources.

    A_edit = A_source, with the edit's own values: the values are not made from this.

    Args:
        places: [B, N, C]
    """
    borrowed = places.clone()
    for rows, plan in edited:
        if plan.injects_self:
            for picture in range(1, rows.group):
                borrowed[rows.of(picture)] = places[rows.of(0)]
    return borrowed


def edit_cross(query: Tensor, key: Tensor, values: Tensor, edited: EditedRows) -> tuple[Tensor, Tensor, Tensor]:
    """What query, key and values of a cross-attention are made from, with every edit that one attention can do.

    Args:
        query: [B, N, C]; key, values: [B, T, C']; before the projections or behind them.
    """
    if any(plan.scales or plan.crosses for _, plan in edited):
        values = values.clone()
    if any(plan.crosses for _, plan in edited):
        query, key = query.clone(), key.clone()
    for rows, plan in edited:
        for picture, factors in plan.scales:
            values[rows.of(picture)] = scale_values(values[rows.of(picture)], factors)
        for picture, cross in plan.crosses.items():
            if cross.own is None:
                query[rows.of(picture)] = query[rows.of(0)]
                key[rows.of(picture)] = key[rows.of(0)]
                if cross.lent is not None:
                    values[rows.of(picture)] = map_values(values[rows.of(picture)], cross.lent)
    return query, key, values


def attend_twice(
    query: Tensor, key: Tensor, values: Tensor, edited: EditedRows, attend: Attend, attend_all: Attend | None = None
) -> Tensor:
    """A cross-attention in which some rows attend by their source's query and key and by their own (refine).

    Args:
        query: [B, N, C]; key, values: [B, T, C]; projected.
        attend: the attention.
        attend_all: the same for all rows, where somebody else has a say in it.

    Returns:
        [B, N, C]
    """
    twice = [
        (rows, picture, cross)
        for rows, plan in edited
        for picture, cross in plan.crosses.items()
        if cross.own is not None
    ]
    kept = values.clone()
    for rows, picture, cross in twice:
        kept[rows.of(picture)] = scale_values(values[rows.of(picture)], cross.own, outside=0.0)
    attended = (attend_all or attend)(query, key, kept)
    for rows, picture, cross in twice:
        lent = map_values(values[rows.of(picture)], cross.lent)
        attended[rows.of(picture)] += attend(query[rows.of(0)], key[rows.of(0)], lent)
    return attended
