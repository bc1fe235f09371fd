"""Every edit of a layer against the same edit of explicit probabilities, in float32 within 1e-5."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_qformer.attention.alignment import Alignment
from blip_qformer.attention.edits import EditedImage, PromptToPrompt, Reweight
from blip_qformer.attention.injection import ConditioningRows, attend_twice, edit_cross, inject_self
from blip_qformer.attention.plan import StepPlan, can_need_two_attentions, plan_step
from blip_qformer.attention.schedule import StepRange
from blip_qformer.attention.values import map_values, scale_values
from tests.attention.explicit import attended, fused, probabilities

CPU = torch.device("cpu")
few = settings(max_examples=30, deadline=None)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@st.composite
def layers(draw, rows: int | None = None):
    """Random query, key and values of a cross-attention whose prompt stands there once or twice, with tokens behind."""
    rows = rows or draw(st.integers(1, 4))
    heads, width = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 8]))
    queries, tokens = draw(st.integers(1, 40)), draw(st.sampled_from([77, 154]))
    positions = tokens * draw(st.integers(1, 2)) + draw(st.sampled_from([0, 0, 4]))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    query, key, values = (torch.randn(rows, count, heads * width) for count in (queries, positions, positions))
    return query, key, values / 2, heads, tokens


def random_alignment(tokens: int, is_swap: bool) -> Alignment:
    """Columns that take over one source token, a share of it, or with a refinement nothing."""
    mapper = torch.zeros(tokens, tokens)
    mapper[torch.randint(tokens, (tokens,)), torch.arange(tokens)] = torch.rand(tokens)
    has_source = torch.ones(tokens, dtype=torch.bool) if is_swap else torch.rand(tokens) < 0.7
    return Alignment(mapper * has_source, has_source)


def random_steps(tokens: int, is_even: bool) -> tuple[StepRange, ...]:
    if is_even:
        return (StepRange(0, 0.8),) * tokens
    return tuple(StepRange(*sorted(torch.rand(2).tolist())) for _ in range(tokens))


def explicit_step(query, key, values, heads, edits, rows, step, steps):
    """The published controllers on probabilities: store and replace, then re-weight; one group of images."""
    a = probabilities(query, key, heads)
    original = a.clone()
    (p2p,) = [edit for edit in edits if isinstance(edit, PromptToPrompt)] or [None]
    for number, image in enumerate(p2p.images if p2p else (), start=1):
        inside = [int(each.start * steps + 1e-4) <= step < int(each.end * steps + 1e-4) for each in image.steps]
        alpha = (torch.tensor(inside) & image.alignment.has_source).float()
        tokens = len(alpha)
        behind = a.shape[-1] // tokens * tokens
        for start in range(0, behind, tokens):  # every copy of the prompt
            copy = slice(start, start + tokens)
            mapped = original[rows.start, ..., copy] @ image.alignment.mapper
            a[rows.start + number, ..., copy] = mapped * alpha + a[rows.start + number, ..., copy] * (1 - alpha)
        if alpha.any():  # then what other nodes append gets the attention that the source gives it
            a[rows.start + number, ..., behind:] = original[rows.start, ..., behind:]
    for edit in edits:
        if isinstance(edit, Reweight) and edit.steps.covers(step, steps):
            for start in range(0, a.shape[-1] - len(edit.factors) + 1, len(edit.factors)):
                a[rows.of(edit.image), ..., start : start + len(edit.factors)] *= edit.factors
    return attended(a, values, heads)


def closed_step(query, key, values, heads, edits, rows, step, steps):
    plan = plan_step(edits, step, steps, CPU)
    edited = [(rows, plan)]
    attend = partial(fused, heads=heads)
    query, key, values = edit_cross(query, key, values, edited)
    if plan.needs_two_attentions:
        return attend_twice(query, key, values, edited, attend)
    return attend(query, key, values)


@few
@given(layers(), st.integers(0, 9))
def test_reweight(layer, step):
    """A[:, j] *= c_j, on the rows of one conditioning."""
    query, key, values, heads, tokens = layer
    edit = Reweight(torch.randn(tokens), StepRange(0.2, 0.7))
    rows = ConditioningRows(len(query) // 2, len(query), 1)
    expected = explicit_step(query, key, values, heads, [edit], rows, step, 10)
    close(closed_step(query, key, values, heads, [edit], rows, step, 10), expected)


@few
@given(layers(rows=4), st.booleans(), st.booleans(), st.integers(0, 9))
def test_swap_and_refine_with_weights_and_ranges(layer, is_swap, is_even, step):
    """Two edits of one source, behind a row of somebody else's."""
    query, key, values, heads, tokens = layer
    images = tuple(EditedImage(random_alignment(tokens, is_swap), random_steps(tokens, is_even)) for _ in range(2))
    p2p = PromptToPrompt(images, StepRange(0, 0.4))
    edits = [Reweight(torch.rand(tokens), StepRange(), 1), Reweight(torch.rand(tokens), StepRange(), None), p2p]
    rows = ConditioningRows(1, 4, 3)
    before = [each.clone() for each in (query, key, values)]
    actual = closed_step(query, key, values, heads, edits, rows, step, 10)
    for each, copy in zip((query, key, values), before, strict=True):
        assert torch.equal(each, copy)
    close(actual, explicit_step(query, key, values, heads, edits, rows, step, 10))
    source = attended(probabilities(query, key, heads), values, heads)[0]
    close(actual[0], source)
    if plan_step(edits, step, 10, CPU).needs_two_attentions:
        assert can_need_two_attentions(p2p)


@few
@given(layers(rows=2))
def test_a_source_that_is_its_own_edit_changes_nothing(layer):
    """Bit by bit: nothing is computed otherwise."""
    query, key, values, heads, tokens = layer
    query, key, values = (each[:1].repeat(2, 1, 1) for each in (query, key, values))
    identity = Alignment(torch.eye(tokens), torch.ones(tokens, dtype=torch.bool))
    p2p = PromptToPrompt((EditedImage(identity, (StepRange(),) * tokens),), StepRange())
    edited = [(ConditioningRows(0, 2, 2), plan_step([p2p], 0, 1, CPU))]
    assert not can_need_two_attentions(p2p)
    for one, other in zip(edit_cross(query, key, values, edited), (query, key, values), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(inject_self(query, edited), query)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 30), st.integers(1, 4), st.integers(0, 10_000))
def test_self_injection(groups, edits, queries, heads, seed):
    """A_edit = A_source in every group, behind two rows of somebody else's."""
    torch.manual_seed(seed)
    group = 1 + edits
    x, to_q, to_k, to_v = torch.randn(2 + groups * group, queries, 8), *torch.randn(3, 8, heads * 4) / 3
    a = probabilities(x @ to_q, x @ to_k, heads)
    for row in range(2, len(x)):
        a[row] = a[2 + (row - 2) // group * group]
    injected = inject_self(x, [(ConditioningRows(2, len(x), group), StepPlan(injects_self=True))])
    close(fused(injected @ to_q, injected @ to_k, x @ to_v, heads), attended(a, x @ to_v, heads))
    assert torch.equal(inject_self(x, [(ConditioningRows(2, len(x), group), StepPlan())]), x)


@few
@given(layers())
def test_values_are_scaled_and_mapped_before_their_projection_as_behind_it(layer):
    _, _, values, heads, tokens = layer
    to_v = torch.randn(values.shape[-1], 4 * heads) / 6
    factors, mapper = torch.randn(tokens), random_alignment(tokens, is_swap=False).mapper
    close(scale_values(values, factors) @ to_v, scale_values(values @ to_v, factors))
    close(map_values(values, mapper) @ to_v, map_values(values @ to_v, mapper))


def test_two_conditionings_of_one_batch():
    """As with areas: each has its own rows and its own plan."""
    torch.manual_seed(0)
    query, key, values = torch.randn(5, 6, 8), torch.randn(5, 77, 8), torch.randn(5, 77, 8)
    edits = [
        PromptToPrompt((EditedImage(random_alignment(77, is_swap=False), (StepRange(),) * 77),), StepRange())
        for _ in range(2)
    ]
    conditionings = [ConditioningRows(0, 2, 2), ConditioningRows(3, 5, 2)]
    plans = [plan_step([edit], 0, 1, CPU) for edit in edits]
    attend = partial(fused, heads=2)
    together = attend_twice(query, key, values, [*zip(conditionings, plans, strict=True)], attend)
    for rows, plan in zip(conditionings, plans, strict=True):
        alone = attend_twice(query, key, values, [(rows, plan)], attend)
        close(together[rows.start : rows.stop], alone[rows.start : rows.stop])
    close(together[2], attend(query, key, values)[2])


def test_what_another_pack_does_to_all_rows_is_kept():
    torch.manual_seed(0)
    query, key, values = torch.randn(2, 6, 8), torch.randn(2, 77, 8), torch.randn(2, 77, 8)
    image = EditedImage(random_alignment(77, is_swap=False), (StepRange(),) * 77)
    edited = [(ConditioningRows(0, 2, 2), plan_step([PromptToPrompt((image,), StepRange())], 0, 1, CPU))]
    attend = partial(fused, heads=2)
    plain = attend_twice(query, key, values, edited, attend)
    added = attend_twice(query, key, values, edited, attend, lambda *inputs: attend(*inputs) + 1)
    close(added, plain + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    torch.manual_seed(0)
    query, key, values = (torch.randn(2, count, 8).to(dtype) for count in (6, 77, 77))
    image = EditedImage(random_alignment(77, is_swap=False), (StepRange(),) * 77)
    edits = [Reweight(torch.rand(77), StepRange(), 1), PromptToPrompt((image,), StepRange())]
    edited = [(ConditioningRows(0, 2, 2), plan_step(edits, 0, 1, CPU))]
    query, key, values = edit_cross(inject_self(query, edited), key, values, edited)
    attended_twice = attend_twice(query, key, values, edited, partial(fused, heads=2))
    assert {each.dtype for each in (query, key, values, attended_twice)} == {dtype}
